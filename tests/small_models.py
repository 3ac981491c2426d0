"""A model small enough for tests, with random weights that use all of its inputs."""

import torch

from ipr_fast.models import PatchTransformer, PatchTransformerConfig

TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)


def randomise(model: PatchTransformer, seed: int) -> PatchTransformer:
    """Set every weight to random numbers: some are initialised to zero, which would leave parts of the model idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)
