"""The posterior step of the moving slots, from level t to t' < t, in place.

With x0 = z - t u and eps = z + (1-t) u, the step z' = (1-t') x0 + gamma eps + tau sigma xi is linear in z and u:

    r     = ((1-t) t' / ((1-t') t))**2
    gamma = t' sqrt(1 - eta**2 (1-r))
    z'    = (1 - t' + gamma) z + (gamma (1-t) - (1-t') t) u + tau sigma xi
    sigma = eta sqrt(1-r) t' (t/t')**v                      (v = 0 without a variance head)

so a slot needs three numbers of its own, and an element two products, one power and one normal. Where t' = 0 all of
gamma, sigma and r vanish and z' = x0.

Shapes: patches (B, N, P) float32; level, next_level, index (B, A); velocity, variance_mix (B, A, P).
Bytes that must move, for each slot that moves: 4 P read and 4 P written of z, the predictions read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.philox import STREAM_POSTERIOR, patch_normals
from ipr_fast.kernels.rows import patch_rows, write_rows


def denoise(
    patches: Tensor,
    *,
    index: Tensor,
    level: Tensor,
    next_level: Tensor,
    velocity: Tensor,
    variance_mix: Tensor | None,
    stochasticity: float,
    temperature: float,
    seed: int,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Step the slots whose level changes; every other patch keeps its bits.

    noise: (B, A, P), to be used in place of the normals that seed and counters define.
    """
    _, num_patches, numel = patches.shape
    rows = patch_rows(index, num_patches)
    z = patches.view(-1, numel).index_select(0, rows.flatten()).view(*rows.shape, numel)

    t, s = level[..., None], next_level[..., None]
    moves = t != s
    t = torch.where(moves, t, 1.0)  # an idle slot's result is dropped; keep its arithmetic finite
    s = torch.where(moves, s, 0.0)
    r = ((1 - t) * s / ((1 - s) * t)).square()
    gamma = s * torch.sqrt(1 - stochasticity**2 * (1 - r))
    new = torch.addcmul(z * (1 - s + gamma), velocity.float(), gamma * (1 - t) - (1 - s) * t)
    if stochasticity * temperature > 0:
        xi = noise
        if xi is None:
            xi = patch_normals(seed, STREAM_POSTERIOR, step, iteration, chain_ids, index.clamp(min=0), numel)
        scale = stochasticity * temperature * torch.sqrt(1 - r) * s
        if variance_mix is not None:
            log_ratio = torch.where(s > 0, torch.log(t / s.clamp_min(1e-30)), 0.0)
            scale = scale * torch.exp(variance_mix.float() * log_ratio)
        new = torch.addcmul(new, scale, xi)
    write_rows(patches, rows, torch.where(moves, new, z), index >= 0)
