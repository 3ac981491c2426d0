"""Models small enough for tests."""

from typing import TypeVar

import torch
from torch import nn

from ipr_fast import PatchGrid, Prediction
from ipr_fast.models import PatchTransformerConfig, TokenTransformerConfig

TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)
PIXELS = PatchTransformerConfig(3, 16, 4, width=32, depth=2, num_heads=2, pixel_width=5)  # with a pixel head
TINY_TOKENS = TokenTransformerConfig(
    vocabulary_size=6, mask_id=0, rows=4, columns=4, width=32, depth=2, num_heads=2, box_size=2
)

Model = TypeVar("Model", bound=nn.Module)


def randomise(model: Model, seed: int) -> Model:
    """Set every weight to random numbers: some are initialised to zero, which would leave parts of the model idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


class Network(nn.Module):
    """A denoiser for tests to break in one way."""

    grid = PatchGrid(1, 16, 16, 4)

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), *layers)

    def forward(self, patches, levels, active=None):
        slots = patches if active is None else active.gather(patches)
        return Prediction(self.layers(slots.flatten(0, 1)).view_as(slots), torch.full_like(slots, 0.5))
