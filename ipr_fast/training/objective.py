"""The training objective: which roles and levels are drawn, and the losses of a batch.

Everything is drawn on the generator's device, without a look at it from the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.sampling.prediction import Prediction

Predict = Callable[[Tensor, Tensor, Tensor], Prediction]

ETA = 0.5  # the stochasticity whose posterior the variance mix is fitted to


# ------------------------------------------------------------------------------------------------ what is drawn


class Draw(NamedTuple):
    """What is random in the losses of a batch of clean patches (B, N, P).

    is_active (B, N) bool; levels (B, N), 0 where not active; noise (B, N, P); step (B, N) in [0, 1): see `best_mix`.
    """

    is_active: Tensor
    levels: Tensor
    noise: Tensor
    step: Tensor


def draw(shape: torch.Size, generator: torch.Generator) -> Draw:
    """For a batch of clean patches of that shape."""
    batch, num_patches, _ = shape
    is_active = sample_roles(batch, num_patches, generator)
    levels = sample_levels(is_active, generator)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return Draw(is_active, levels, noise, _uniform(batch, num_patches, generator))


def sample_roles(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """Roles (B, N) bool, True = active: a third of the samples wholly active, in the others uniformly 1..N patches."""
    count = torch.randint(1, num_patches + 1, (batch, 1), generator=generator, device=generator.device)
    count = torch.where(_uniform(batch, 1, generator) < 1 / 3, num_patches, count)
    return _uniform(batch, num_patches, generator).argsort(1).argsort(1) < count


def sample_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    """Levels (B, N) in [0, 1], 0 for the context.

    Half of the samples stand somewhere on a staircase as schedules make them (a random order, overlap and progress);
    the others have independent levels (logit-normal) around a centre that is uniform in [0, 1], from nearly equal
    ones to nearly only 0 and 1. Both contain patches that are exactly clean and exactly noise.
    """
    batch, num_patches = is_active.shape
    levels = torch.where(
        _uniform(batch, 1, generator) < 0.5,
        _staircase_levels(is_active, generator),
        _scattered_levels(batch, num_patches, generator),
    )
    return levels * is_active


def _staircase_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    batch, num_patches = is_active.shape
    count = is_active.sum(1, keepdim=True)
    stagger = _uniform(batch, 1, generator)  # 1 - overlap
    stagger = torch.where(_uniform(batch, 1, generator) < 0.25, 1.0, stagger)
    keys = _uniform(batch, num_patches, generator) + 2.0 * ~is_active  # active patches first
    rank = keys.argsort(1).argsort(1)
    progress = _uniform(batch, 1, generator) * ((count - 1) * stagger + 1)
    return (1 - (progress - rank * stagger)).clamp(0, 1)


def _scattered_levels(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    centre = _uniform(batch, 1, generator).clamp(1e-3, 1 - 1e-3).logit()
    spread = torch.exp(math.log(0.2) + _uniform(batch, 1, generator) * math.log(8.0 / 0.2))
    normal = torch.randn(batch, num_patches, generator=generator, device=generator.device)
    return (1.1 * (centre + spread * normal).sigmoid() - 0.05).clamp(0, 1)  # stretched, so that both ends are reached


def _uniform(batch: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, count, generator=generator, device=generator.device)


# -------------------------------------------------------------------------------------------------------- losses


class Losses(NamedTuple):
    """velocity: mean squared error. log_variance: Gaussian log-likelihood. mix: squared distance from the best mix."""

    velocity: Tensor
    log_variance: Tensor
    mix: Tensor

    @property
    def total(self) -> Tensor:
        return self.velocity + 0.1 * self.log_variance + 0.1 * self.mix


def compute_losses(predict: Predict, clean: Tensor, drawn: Draw) -> Losses:
    """The losses of a batch of clean patches (B, N, P); `predict` is that of a PatchTransformer."""
    t = drawn.levels[..., None]
    prediction = predict((1 - t) * clean + t * drawn.noise, drawn.levels, drawn.is_active)
    log_variance = prediction.log_variance.float()
    square = (prediction.velocity - (drawn.noise - clean)).square()
    noisy = (drawn.levels > 0).float()  # nothing can be learned of the noise of a clean patch
    patch_error = square.mean(-1).detach()
    log_likelihood = 0.5 * (patch_error * torch.exp(-log_variance) + log_variance)
    target, weight = best_mix(drawn.levels, patch_error, drawn.step)
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
