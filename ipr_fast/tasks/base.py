"""What the trainer asks of a task."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformerConfig


class Task(Protocol):
    """A source of training samples, and the model that fits them."""

    name: str
    config: PatchTransformerConfig

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1], on the CPU."""
        ...
