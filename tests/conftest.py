"""Models and chains that several tests use."""

import pytest
import torch

from ipr_fast.models import PatchTransformer, PatchTransformerConfig

# On tensors as small as the tests' a second thread gains nothing, and beside another busy process the two spin.
torch.set_num_threads(1)

TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)


def randomise(model: PatchTransformer, seed: int) -> PatchTransformer:
    """Move every weight away from its start, zeros above all, so that no part of the model is idle."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model() -> PatchTransformer:
    """A small model of 16 patches, with random weights that make it depend on everything."""
    return randomise(PatchTransformer(TINY), seed=0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture
def ragged_known(generator) -> torch.Tensor:
    """(12, 16) bool: every number of clues from none to all, in one batch."""
    number = torch.tensor([0, 16, 15, 1, 2, 3, 5, 7, 8, 10, 12, 14])[:, None]
    return torch.rand(12, 16, generator=generator).argsort(1).argsort(1) < number


@pytest.fixture
def finished(generator) -> torch.Tensor:
    """(12, 1, 16, 16) images."""
    return torch.randn(12, 1, 16, 16, generator=generator).clamp(-1, 1)
