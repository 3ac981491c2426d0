"""A masked autoregressive model with a diffusion head: the backbone runs in `prepare`, the head denoises."""

import math

import pytest
import torch
from torch import nn

from ipr_fast import ActivePatches, PatchGrid, Schedule, check_model, generate_batch, random_patches, refine_batch
from ipr_fast.models import Guided, MARDenoiser, Parameterised
from ipr_fast.models.flows import CosineFlow

GRID = PatchGrid.of((1, 4), 1)  # sequences of four numbers
RHO = 0.6
COVARIANCE = RHO * torch.ones(4, 4) + (1 - RHO) * torch.eye(4)


class Backbone(nn.Module):
    """A stand-in of MAR's backbone: a small transformer over visible patches and mask tokens."""

    def __init__(self, numel, width=8, labels=None):
        super().__init__()
        torch.manual_seed(0)
        self.patch_in, self.mask = nn.Linear(numel, width), nn.Parameter(torch.randn(width))
        self.place = nn.Parameter(torch.randn(16, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.label = None if labels is None else nn.Embedding(labels, width)
        self.calls = 0

    def forward(self, patches, masked, condition=None):
        self.calls += 1
        h = torch.where(masked[..., None], self.mask, self.patch_in(patches)) + self.place[: patches.shape[1]]
        if self.label is not None:
            h = h + self.label(condition)[:, None]
        return self.block(h)


class Head(nn.Module):
    """A stand-in of MAR's head: an MLP of a noisy patch, its time and z."""

    def __init__(self, numel, width=8, outputs=1):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(numel + 1 + width, 16), nn.SiLU(), nn.Linear(16, outputs * numel))

    def forward(self, x, time, z):
        return self.layers(torch.cat([x, time[:, None], z], -1))


def stand_in(labels=None, outputs=1):
    grid = PatchGrid(1, 16, 16, 4)
    parts = Backbone(16, labels=labels).eval(), Head(16, outputs=outputs).eval()
    return MARDenoiser(*parts, grid, is_conditional=labels is not None).eval().requires_grad_(False)


@pytest.mark.parametrize("labels", [None, 5])
@pytest.mark.parametrize("outputs", [1, 2])
def test_it_keeps_the_contract(labels, outputs):
    check_model(stand_in(labels, outputs), condition=None if labels is None else torch.arange(4))


def test_it_keeps_the_contract_with_a_head_that_predicts_the_noise_of_another_flow():
    check_model(Parameterised(stand_in(), "eps", CosineFlow(), max_level=0.99))


def test_the_backbone_runs_once_an_iteration_and_sees_no_masked_patch(finished):
    model, policy, schedule = stand_in(), random_patches(0.25), Schedule(6, 0.8)
    refine_batch(finished, policy, 1, model=model, schedule=schedule)
    before = model.backbone.calls
    refine_batch(finished, policy, 4, model=model, schedule=schedule)
    assert model.backbone.calls - before <= 4 + 1  # the first call of all lanes allocates the context
    active = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    patches = model.grid.to_patches(finished)
    other = torch.where(active[..., None], 100.0, patches)

    index = ActivePatches.from_mask(active)
    assert torch.equal(model.prepare(patches, index).z, model.prepare(other, index).z)


def test_engine_and_graphs_equal_the_reference(finished, ragged_known, tape):
    model = stand_in(labels=12)
    options = {"known": ragged_known, "schedule": Schedule(3, 0.5), "condition": torch.arange(12)}
    for each in (model, Guided(model, 2.0, torch.tensor(0))):
        runs = [
            refine_batch(finished, random_patches(0.5), 3, model=each, backend=backend, max_chains=5, **options)
            for backend in ("auto", "torch", "reference")
        ]
        for found in runs[:2]:
            assert (found - runs[2]).abs().max() < 2e-5 * runs[2].abs().max().clamp(min=1)


def gaussian_backbone(patches, masked):
    """Mean and variance of each masked number of N(0, COVARIANCE), given the visible ones: z (B, N, 2)."""
    precision, both = torch.linalg.inv(COVARIANCE), masked[:, :, None] & masked[:, None, :]
    inverse = torch.linalg.inv(torch.where(both, precision, torch.eye(4)))
    mean = -(inverse @ ((precision @ patches) * masked[..., None]))
    return torch.cat([mean, inverse.diagonal(dim1=1, dim2=2)[..., None]], -1)


def gaussian_head(x, time, z):
    """The velocity of N(mean, variance): u = (x - E[clean | x]) / t."""
    mean, variance, t = z[:, :1], z[:, 1:], time[:, None].clamp(min=1e-6)
    gain = (1 - t) * variance / ((1 - t).square() * variance + t.square())
    return (x - mean - gain * (x - (1 - t) * mean)) / t


def test_an_exact_one_samples_a_gaussian_law_patch_by_patch():
    """As a Gibbs sampler: numbers that were generated at once are independent, refined ones have their covariance."""
    model, chains = MARDenoiser(gaussian_backbone, gaussian_head, GRID), 8192
    check_model(model)
    schedule = Schedule(60, 1.0)
    x = generate_batch(chains, model=model, schedule=schedule, stochasticity=0.0)
    error = 5 * math.sqrt(2 / chains)
    assert (x[:, 0].T.cov() - torch.eye(4)).abs().max() < error + 0.03  # sixty steps lose 2/60 of the variance
    x = refine_batch(x, random_patches(0.25), 24, model=model, schedule=schedule, stochasticity=0.0)
    assert (x[:, 0].T.cov() - COVARIANCE).abs().max() < error + 0.03
    assert x.mean().abs() < 5 / math.sqrt(chains)


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="head must be callable, got int"):
        MARDenoiser(gaussian_backbone, 3, GRID)
    with pytest.raises(ValueError, match=r"backbone must return a tensor \(2, 4, D\), got \(2, 4\) of torch.bool"):
        generate_batch(2, model=MARDenoiser(lambda patches, masked: masked, gaussian_head, GRID))
    with pytest.raises(ValueError, match=r"head must return a tensor \(8, 1\), got \(8,\) of torch.float32"):
        generate_batch(2, model=MARDenoiser(gaussian_backbone, lambda x, time, z: time, GRID))
    with pytest.raises(ValueError, match="condition must be given, got NoneType"):
        generate_batch(2, model=stand_in(labels=3))
    with pytest.raises(ValueError, match="condition must be None: is_conditional is False, got"):
        generate_batch(2, model=stand_in(), condition=torch.arange(2))
