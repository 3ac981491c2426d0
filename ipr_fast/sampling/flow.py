"""Rectified flow and its posterior step, in the paper's symbols.

z_t = (1-t) x + t eps, and the model predicts u = eps - x. Levels broadcast against values: pass t as (..., 1) for
patches (..., P). Source: Wewer et al. 2025 (sequential diffusion), with the stochasticity of DDIM (Song et al. 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t, the sample x at level t."""
    return (1 - t) * x + t * eps


def clean(z: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """The sample x0 that z_t and the velocity u imply."""
    return z - t * u


def noise(z: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """The noise eps that z_t and the velocity u imply."""
    return z + (1 - t) * u


def ratio(t: Tensor, t_next: Tensor) -> Tensor:
    """r = ((1-t) t' / ((1-t') t))**2; 1 where t = 0 or t' = 1, where nothing moves."""
    defined = (t > 0) & (t_next < 1)
    r = ((1 - t) * t_next / torch.where(defined, (1 - t_next) * t, 1.0)).square()
    return torch.where(defined, r, 1.0)


def gamma(t: Tensor, t_next: Tensor, eta: float) -> Tensor:
    """The share of the predicted noise that stays; t' where t' = 1, and 0 where t = 0."""
    return torch.where(t > 0, t_next * torch.sqrt(1 - eta**2 * (1 - ratio(t, t_next))), 0.0)


def sigma(t: Tensor, t_next: Tensor, eta: float, v: Tensor | None = None) -> Tensor:
    """The standard deviation of the fresh noise: `small`, or the geometric mix of small and large by v in [0, 1]."""
    spread = eta * torch.sqrt(1 - ratio(t, t_next))
    small, large = t_next * spread, t * spread
    if v is None:
        return small
    both = (small > 0) & (large > 0)
    log_small, log_large = (torch.log(torch.where(both, bound, 1.0)) for bound in (small, large))
    return torch.where(both, torch.exp(v * log_large + (1 - v) * log_small), 0.0)


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
) -> Tensor:
    """z at level t' <= t: (1-t') x0 + gamma eps + tau sigma xi. Patches with t = t' keep their bits.

    eta in [0, 1] is the stochasticity, tau >= 0 the temperature, xi standard normals.
    """
    mean = (1 - t_next) * clean(z, u, t) + gamma(t, t_next, eta) * noise(z, u, t)
    fresh = torch.where(t_next > 0, tau * sigma(t, t_next, eta, v) * xi, 0.0)
    return torch.where(t == t_next, z, mean + fresh)
