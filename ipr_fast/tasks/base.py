"""What the trainer, the demo and the evaluation ask of a task."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformer, PatchTransformerConfig


class Report(Protocol):
    """What a judge finds: a NamedTuple of tensors, each with one entry a sample."""

    @property
    def good(self) -> Tensor:
        """(B,) bool: the sample is what the task asks for."""
        ...

    def measures(self) -> dict[str, Tensor]:
        """How far each sample is from that, by name: (B,) numbers, 0 at best."""
        ...


class Judge(Protocol):
    """Tells good samples from others."""

    @property
    def note(self) -> str:
        """How far to trust it, in words; empty where it cannot err."""
        ...

    def __call__(self, images: Tensor) -> Report:
        """Judge samples (B, C, H, W), on their device."""
        ...


class Task(Protocol):
    """A source of training samples, the model that fits them, and a judge of samples.

    noun, adjective: what a sample is called, and a good one ("board", "valid").
    """

    name: str
    noun: str
    adjective: str
    config: PatchTransformerConfig

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1], made on the generator's device."""
        ...

    def initialise(self, model: PatchTransformer) -> None:
        """Change a new model's weights to those that training should begin with."""
        ...

    def judge(self) -> Judge:
        """What judges samples of this task."""
        ...
