"""Rectified flow and its posterior step, in the paper's symbols.

    z_t = (1 - t) x + t eps          the sample x with noise eps at level t
    u   = eps - x                    velocity, which the model predicts

Levels broadcast against values: pass t as (..., 1) for patches (..., P); `t_next` is t' <= t.
Source: Wewer et al. 2025 (sequential diffusion), with the stochasticity eta of DDIM (Song et al. 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return z_t = (1 - t) x + t eps."""
    return (1 - t) * x + t * eps


def clean(z: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Return the clean sample implied by z_t and the velocity: x0 = z - t u."""
    return z - t * u


def noise(z: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Return the noise implied by z_t and the velocity: eps = z + (1 - t) u."""
    return z + (1 - t) * u


def ratio(t: Tensor, t_next: Tensor) -> Tensor:
    """Return r = ((1 - t) t' / ((1 - t') t))**2; 1 where t = 0 or t' = 1, where nothing moves."""
    defined = (t > 0) & (t_next < 1)
    r = ((1 - t) * t_next / torch.where(defined, (1 - t_next) * t, 1.0)).square()
    return torch.where(defined, r, 1.0)


def gamma(t: Tensor, t_next: Tensor, eta: float) -> Tensor:
    """Return the factor of the predicted noise, t' sqrt(1 - eta^2 (1 - r)); t' where t' = 1, 0 where t = 0."""
    return torch.where(t > 0, t_next * torch.sqrt(1 - eta**2 * (1 - ratio(t, t_next))), 0.0)


def sigma(t: Tensor, t_next: Tensor, eta: float, v: Tensor | None = None, *, preserving: bool = False) -> Tensor:
    """Return the standard deviation of the fresh noise, a geometric mix of its two bounds by v in [0, 1].

    small = eta t' sqrt(1 - r), large = eta t sqrt(1 - r), sigma = exp(v log large + (1 - v) log small); 0 where a bound
    is 0. Without v, sigma = small.

    preserving: the bounds are of a flow that preserves variance, z = a x + b eps with a^2 + b^2 = 1. Its large one is
    eta b sqrt(1 - r), here in the units a' + b' of the next state, so by (a + b) / (a' + b') larger.
    """
    spread = eta * torch.sqrt(1 - ratio(t, t_next))
    small, large = t_next * spread, t * spread
    if preserving:
        large = large * torch.sqrt((t_next.square() + (1 - t_next).square()) / (t.square() + (1 - t).square()))
    if v is None:
        return small
    positive = (small > 0) & (large > 0)
    log_small, log_large = (torch.log(torch.where(positive, bound, 1.0)) for bound in (small, large))
    return torch.where(positive, torch.exp(v * log_large + (1 - v) * log_small), 0.0)


def posterior_step(
    z: Tensor,
    u: Tensor,
    v: Tensor | None,
    t: Tensor,
    t_next: Tensor,
    xi: Tensor,
    *,
    eta: float,
    tau: float = 1.0,
    preserving: bool = False,
) -> Tensor:
    """Take z from level t to t' <= t: z' = (1 - t') x0 + gamma eps + tau sigma xi.

    v is the variance mix in [0, 1] or None, xi are standard normals, eta in [0, 1] is the stochasticity, tau >= 0 the
    temperature. No noise is added where t' = 0; patches with t' = t keep their bits. preserving: see `sigma`.
    """
    mean = (1 - t_next) * clean(z, u, t) + gamma(t, t_next, eta) * noise(z, u, t)
    fresh = torch.where(t_next > 0, tau * sigma(t, t_next, eta, v, preserving=preserving) * xi, 0.0)
    return torch.where(t == t_next, z, mean + fresh)
