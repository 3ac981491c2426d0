"""Fixtures: small models as files."""

import pytest

import ipr_fast


@pytest.fixture
def weights(tmp_path):
    """A small model of 16x16 samples, as a file."""
    from small_models import TINY, randomise

    path = tmp_path / "tiny.safetensors"
    ipr_fast.save_model(randomise(ipr_fast.models.PatchTransformer(TINY), seed=0), path)
    return str(path)


@pytest.fixture
def even_pixels_weights(tmp_path):
    """A small model of Even Pixels that has learned nothing, as a file."""
    from small_models import randomise

    config = ipr_fast.models.PatchTransformerConfig(
        3, 32, 4, width=16, depth=1, num_heads=1, generate_schedule=(1, 0.9), refine_schedule=(1, 0.9)
    )
    path = tmp_path / "even.safetensors"
    ipr_fast.save_model(randomise(ipr_fast.models.PatchTransformer(config), seed=0), path)
    return str(path)
