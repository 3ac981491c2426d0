"""Embeddings of noise levels: sinusoidal features, then Linear, SiLU, Linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LevelEmbedding(nn.Module):
    """Embedding (..., width) of levels (...) in [0, 1]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, levels: Tensor) -> Tensor:
        return self.embed(levels.float()[..., None] * (1000.0 * self.frequencies(levels.device)))

    def embed(self, angles: Tensor) -> Tensor:
        """Apply the MLP to the cosines and sines of angles (..., features / 2)."""
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype))

    def frequencies(self, device: torch.device) -> Tensor:
        """Frequencies (features / 2,) from 1 down to nearly 1/10000, geometrically."""
        half = self.features // 2
        return torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / half))


class PublishedLevelEmbedding(LevelEmbedding):
    """The embedding of the published SRM UNet, with the SiLU that every layer applies to it.

    Its angles are of `max(scale t + shift, 0)`, with 1000 and -1 the level as a DDPM timestep 0..999.
    """

    def __init__(self, features: int, width: int, scale: float = 1000, shift: float = -1) -> None:
        super().__init__(features, width)
        self.scale, self.shift = scale, shift

    def forward(self, levels: Tensor) -> Tensor:
        steps = (self.scale * levels.float() + self.shift).clamp(min=0)
        return F.silu(self.embed(steps[..., None] * self.frequencies(levels.device)))
