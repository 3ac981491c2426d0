"""What few steps cost: with the exact denoiser of a Gaussian mixture, refinement loses variance that many steps keep.

.venv/bin/python -m pytest tests/sampling/test_few_steps.py -rP
"""

import pytest
import torch
from gaussian_mixture import MEAN, STD, ExactDenoiser, draw

from ipr_fast import Schedule, random_patches, refine_batch

# Measured with 2 x 65,536 chains: standard error 0.002.
KEPT = {Schedule(3, 0.0): 0.656, Schedule(10, 0.8): 0.851, Schedule(30, 0.0): 0.946, Schedule(100, 1.0): 0.982}
CHAINS, ITERS = 4096, 8


def trace_of_covariance(x):
    """The trace as a share of the mixture's, and its standard error."""
    squares = (x - x.mean(0)).square().flatten(1).sum(1)
    true = 4 * (STD**2 + MEAN**2)
    return squares.mean().item() / true, squares.std().item() / len(x) ** 0.5 / true


@pytest.fixture(scope="module")
def exact_samples():
    return draw(CHAINS)


@pytest.mark.parametrize("schedule", KEPT, ids=str)
def test_refinement_keeps_this_share_of_the_covariance(exact_samples, schedule):
    """Half of the patches a time, eta 0.5, no variance mix; within five standard errors of the sample."""
    refined = refine_batch(exact_samples, random_patches(0.5), ITERS, model=ExactDenoiser(), schedule=schedule)
    share, error = trace_of_covariance(refined)
    print(f"{schedule}: {share:.2f} of the covariance's trace is kept, +- {error:.2f}")
    assert share == pytest.approx(KEPT[schedule], abs=5 * error)


def test_the_start_has_all_of_it(exact_samples):
    share, error = trace_of_covariance(exact_samples)
    assert share == pytest.approx(1, abs=5 * error)


def test_the_denoiser_is_exact():
    """Its velocity is the mean of eps - x over samples whose noisy state lies close by, on one patch of level 0.5."""
    generator = torch.Generator().manual_seed(0)
    x = MEAN * (2.0 * torch.randint(2, (400_000, 1), generator=generator) - 1)
    x = x + STD * torch.randn(400_000, 4, generator=generator)
    eps = torch.randn(400_000, generator=generator)
    z = x.clone()
    z[:, 0] = 0.5 * x[:, 0] + 0.5 * eps
    levels = torch.tensor([0.5, 0.0, 0.0, 0.0]).expand(400_000, 4)
    predicted = ExactDenoiser()(z[..., None], levels).velocity[:, 0, 0]
    error = eps - x[:, 0] - predicted
    for feature in (torch.ones_like(error), z[:, 0], z[:, 1], z[:, 1:].sum(1).tanh(), z[:, 0] * z[:, 1]):
        product = error * feature  # the error of a posterior mean is uncorrelated with every function of z
        assert product.mean().abs() < 5 * product.std() / len(product) ** 0.5
