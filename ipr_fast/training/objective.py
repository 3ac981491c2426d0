"""The training objective of patches: roles, levels and noise of a batch, and its losses.

Everything is drawn on the generator's device, with no host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.sampling import flow
from ipr_fast.sampling.prediction import Prediction

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Prediction, Tensor | None]]

ETA = 0.5  # stochasticity of the posterior that the variance mix is fitted to


# --------------------------------------------------------------------------------------------------------- draws


class Draw(NamedTuple):
    """Random numbers of a batch of patches (B, N, P).

    is_active (B, N) bool; levels (B, N), 0 where not active; noise (B, N, P); step (B, N) in [0, 1): see `best_mix`.
    """

    is_active: Tensor
    levels: Tensor
    noise: Tensor
    step: Tensor


def draw(shape: torch.Size, generator: torch.Generator, few_active: float = 0.0) -> Draw:
    """Draw the random numbers for patches of shape (B, N, P). few_active: as for `sample_roles`."""
    batch, num_patches, _ = shape
    is_active = sample_roles(batch, num_patches, generator, few_active)
    levels = sample_levels(is_active, generator)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return Draw(is_active, levels, noise, uniform(batch, num_patches, generator))


def sample_roles(batch: int, num_patches: int, generator: torch.Generator, few_active: float = 0.0) -> Tensor:
    """Draw roles (B, N) bool, True = active: all N in a third of the samples, else a uniform number in 1..N.

    few_active: the share of the latter that gets a log-uniform number instead.
    """
    count = torch.randint(1, num_patches + 1, (batch, 1), generator=generator, device=generator.device)
    if few_active:
        few = (num_patches ** uniform(batch, 1, generator)).long()
        count = torch.where(uniform(batch, 1, generator) < few_active, few, count)
    count = torch.where(uniform(batch, 1, generator) < 1 / 3, num_patches, count)
    return uniform(batch, num_patches, generator).argsort(1).argsort(1) < count


def sample_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    """Draw levels (B, N) in [0, 1], 0 for the context.

    Half of the samples have the levels of a schedule in progress, with a random order, overlap and progress. The others
    have independent logit-normal levels around a centre uniform in [0, 1], with a spread from nearly equal levels to
    nearly only 0 and 1. Both contain levels of exactly 0 and 1.
    """
    batch, num_patches = is_active.shape
    levels = torch.where(
        uniform(batch, 1, generator) < 0.5,
        _staircase_levels(is_active, generator),
        _scattered_levels(batch, num_patches, generator),
    )
    return levels * is_active


def _staircase_levels(is_active: Tensor, generator: torch.Generator) -> Tensor:
    batch, num_patches = is_active.shape
    count = is_active.sum(1, keepdim=True)
    stagger = uniform(batch, 1, generator)  # 1 - overlap
    stagger = torch.where(uniform(batch, 1, generator) < 0.25, 1.0, stagger)
    keys = uniform(batch, num_patches, generator) + 2.0 * ~is_active  # active patches first
    rank = keys.argsort(1).argsort(1)
    progress = uniform(batch, 1, generator) * ((count - 1) * stagger + 1)
    return (1 - (progress - rank * stagger)).clamp(0, 1)


def _scattered_levels(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    centre = uniform(batch, 1, generator).clamp(1e-3, 1 - 1e-3).logit()
    spread = torch.exp(math.log(0.2) + uniform(batch, 1, generator) * math.log(8.0 / 0.2))
    normal = torch.randn(batch, num_patches, generator=generator, device=generator.device)
    return (1.1 * (centre + spread * normal).sigmoid() - 0.05).clamp(0, 1)  # stretched to reach both ends


def uniform(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers (batch, count) in [0, 1)."""
    return torch.rand(batch, count, generator=generator, device=generator.device)


# -------------------------------------------------------------------------------------------------------- losses


class Losses(NamedTuple):
    """Scalars, means over noisy patches.

    velocity: squared error. log_variance: Gaussian likelihood. mix: squared error of `best_mix`. symbols: cross-entropy
    of the symbols that the patches show, 0 without a symbol head. mean: squared error of each channel's mean over a
    sample's noisy pixels, see `mean_error`.
    """

    velocity: Tensor
    log_variance: Tensor
    mix: Tensor
    symbols: Tensor
    mean: Tensor

    def total(self, symbol_weight: float = 0.0, mean_weight: float = 0.0) -> Tensor:
        """Return the weighted sum that training minimises."""
        own = self.velocity + 0.1 * self.log_variance + 0.1 * self.mix
        return own + symbol_weight * self.symbols + mean_weight * self.mean


def compute_losses(
    predict: Predict, clean: Tensor, drawn: Draw, symbols: Tensor | None = None, *, channels: int = 1
) -> Losses:
    """Return the losses of clean patches (B, N, P) that show `symbols` (B, N) int64.

    predict: takes noisy patches, levels and roles as `PatchTransformer.predict` does; returns its prediction and the
    logits (B, N, S) of the symbols, or None without them.
    """
    t = drawn.levels[..., None]
    prediction, logits = predict((1 - t) * clean + t * drawn.noise, drawn.levels, drawn.is_active)
    assert prediction.variance_mix is not None
    assert prediction.log_variance is not None
    log_variance = prediction.log_variance.float()
    error = prediction.velocity - (drawn.noise - clean)
    square = error.square()
    noisy = (drawn.levels > 0).float()  # a clean patch says nothing about its noise
    patch_error = square.mean(-1).detach()
    log_likelihood = 0.5 * (patch_error * torch.exp(-log_variance) + log_variance)
    target, weight = best_mix(drawn.levels, patch_error, drawn.step)
    mix_error = (prediction.variance_mix - target[..., None]).square().mean(-1)
    symbol_error = torch.zeros_like(noisy)
    if logits is not None and symbols is not None:
        symbol_error = F.cross_entropy(logits.float().movedim(-1, 1), symbols, reduction="none")
    return Losses(
        velocity=_weighted_mean(square.mean(-1), noisy),
        log_variance=_weighted_mean(log_likelihood, noisy),
        mix=_weighted_mean(mix_error, weight * noisy),
        symbols=_weighted_mean(symbol_error, noisy),
        mean=mean_error(error, t, channels),
    )


def mean_error(velocity_error: Tensor, t: Tensor, channels: int) -> Tensor:
    """Return n times the squared error of the mean of a sample's n noisy pixels, averaged over channels and samples.

    The mean is of the predicted clean values, whose errors are `t` (B, N, 1) times the velocity's (B, N, P).
    Independent errors give their own mean square, whatever n is. As the velocity's loss does, it has its minimum at the
    posterior mean. But a constraint on a whole sample, such as equal numbers of pixels, changes each of its values by
    little, and their mean by as much as it varies.
    """
    clean_error = (t * velocity_error).unflatten(-1, (channels, -1))  # (B, N, C, pixels)
    pixels = (t > 0).sum((1, 2)).clamp_min(1) * clean_error.shape[-1]
    return (clean_error.sum((1, 3)).square() / pixels[:, None]).mean()


def best_mix(t: Tensor, velocity_error: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best variance mix for a step from t to a random t' (chosen by u in [0, 1)), and its weight 0 or 1.

    The step's mean is off by `(gamma (1-t) - (1-t') t)` times the velocity's error. The variance that accounts for that
    is small**2 plus its square; the mix is its position between log small and log large, clamped to [0, 1].
    """
    t_next = t - (0.05 + 0.35 * u)
    weight = (t_next > 0.02).float()
    t, t_next = t.clamp_min(0.03), t_next.clamp_min(0.02)
    r = flow.ratio(t, t_next).clamp(max=0.999)
    gamma = t_next * torch.sqrt(1 - ETA**2 * (1 - r))
    small_variance = (ETA * t_next * torch.sqrt(1 - r)).square()
    error = velocity_error * (gamma * (1 - t) - (1 - t_next) * t).square()
    mix = torch.log1p(error / small_variance) / (2 * torch.log(t / t_next).clamp_min(1e-3))
    return mix.clamp(0, 1), weight


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1)
