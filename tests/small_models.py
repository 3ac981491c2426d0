"""A model small enough for tests, with weights that make it depend on everything."""

import torch

from ipr_fast.models import PatchTransformer, PatchTransformerConfig

TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)


def randomise(model: PatchTransformer, seed: int) -> PatchTransformer:
    """Move every weight away from its start, zeros above all, so that no part of the model is idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)
