"""The training objective: which roles and levels are drawn, and the losses of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformer

ETA = 0.5  # the stochasticity whose posterior the variance mix is fitted to


# ------------------------------------------------------------------------------------------------ what is drawn


def sample_roles(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """Roles (B, N) bool, True = active: a third of the samples wholly active, in the others uniformly 1..N patches."""
    count = torch.randint(1, num_patches + 1, (batch, 1), generator=generator)
    count[torch.rand(batch, 1, generator=generator) < 1 / 3] = num_patches
    return _random_ranks(batch, num_patches, generator) < count


def sample_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    """Levels (B, N) in [0, 1], 0 for the context.

    Half of the samples stand somewhere on a staircase as schedules make them (a random order, overlap and progress);
    the others have independent levels (logit-normal) around a centre that is uniform in [0, 1], from nearly equal
    ones to nearly only 0 and 1. Both contain patches that are exactly clean and exactly noise.
    """
    batch, num_patches = is_active.shape
    levels = torch.where(
        torch.rand(batch, 1, generator=generator) < 0.5,
        _staircase_levels(is_active, generator),
        _scattered_levels(batch, num_patches, generator),
    )
    return levels * is_active


def _staircase_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    batch, num_patches = is_active.shape
    count = is_active.sum(1, keepdim=True)
    stagger = torch.rand(batch, 1, generator=generator)  # 1 - overlap
    stagger[torch.rand(batch, 1, generator=generator) < 0.25] = 1.0
    keys = torch.rand(batch, num_patches, generator=generator) + 2.0 * ~is_active  # active patches first
    rank = keys.argsort(1).argsort(1)
    progress = torch.rand(batch, 1, generator=generator) * ((count - 1) * stagger + 1)
    return (1 - (progress - rank * stagger)).clamp(0, 1)


def _scattered_levels(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    centre = torch.rand(batch, 1, generator=generator).clamp(1e-3, 1 - 1e-3).logit()
    spread = torch.exp(math.log(0.2) + torch.rand(batch, 1, generator=generator) * math.log(8.0 / 0.2))
    level = (centre + spread * torch.randn(batch, num_patches, generator=generator)).sigmoid()
    return (1.1 * level - 0.05).clamp(0, 1)  # stretched, so that both ends are reached


def _random_ranks(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, num_patches, generator=generator).argsort(1).argsort(1)


# -------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Losses:
    """velocity: mean squared error. log_variance: Gaussian log-likelihood. mix: squared distance from the best mix."""

    velocity: Tensor
    log_variance: Tensor
    mix: Tensor

    @property
    def total(self) -> Tensor:
        return self.velocity + 0.1 * self.log_variance + 0.1 * self.mix


def compute_losses(model: PatchTransformer, clean: Tensor, generator: torch.Generator) -> Losses:
    """The losses for one batch of clean patches (B, N, P)."""
    batch, num_patches, _ = clean.shape
    is_active = sample_roles(batch, num_patches, generator).to(clean.device)
    levels = sample_levels(is_active.cpu(), generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    t = levels[..., None]
    prediction = model.predict((1 - t) * clean + t * noise, levels, is_active)
    square = (prediction.velocity - (noise - clean)).square()
    noisy = (levels > 0).float()  # nothing can be learned of the noise of a clean patch
    patch_error = square.mean(-1).detach()
    log_likelihood = 0.5 * (patch_error * torch.exp(-prediction.log_variance) + prediction.log_variance)
    target, weight = best_mix(levels, patch_error, torch.rand(levels.shape, generator=generator).to(clean.device))
    mix_error = (prediction.variance_mix - target[..., None]).square().mean(-1)
    return Losses(
        velocity=_weighted_mean(square.mean(-1), noisy),
        log_variance=_weighted_mean(log_likelihood, noisy),
        mix=_weighted_mean(mix_error, weight * noisy),
    )


def best_mix(t: Tensor, velocity_error: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The variance mix that fits a step from level t to a random t' (u in [0, 1) chooses it), and its weight 0 or 1.

    A step's mean errs by `(gamma (1-t) - (1-t') t)` times the velocity's error. The variance that makes up for it is
    small**2 plus the square of that, and the mix v is its place between log small and log large, cut to [0, 1].
    """
    step = 0.05 + 0.35 * u
    s = t - step  # t'
    weight = (s > 0.02).float()
    s = s.clamp_min(0.02)
    t = t.clamp_min(0.03)
    r = ((1 - t) * s / ((1 - s) * t)).square().clamp(max=0.999)
    gamma = s * torch.sqrt(1 - ETA**2 * (1 - r))
    small = (ETA * s * torch.sqrt(1 - r)).square()
    error = velocity_error * (gamma * (1 - t) - (1 - s) * t).square()
    mix = torch.log1p(error / small) / (2 * torch.log(t / s).clamp_min(1e-3))
    return mix.clamp(0, 1), weight


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1)
