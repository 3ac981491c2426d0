"""What the trainer, the demo and the evaluation ask of a task."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
    """A source of training samples, and a judge of samples.

    noun, adjective: what a sample is called, and a good one ("board", "valid").

    A task of your own that is to be trained also has the network's `config`, see `ipr_fast.training.configs`.
    """

    name: str
    noun: str
    adjective: str

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1], made on the generator's device."""
        ...

    def judge(self) -> Judge:
        """What judges samples of this task."""
        ...
