"""Checks of patch masks, chain ids, schedules and random-number counters; each raises ValueError."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels import philox
from ipr_fast.sampling.patches import Positions
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.tokens import TokenSampling


def patch_mask(name: str, value: object, batch: int, grid: Positions, device: torch.device) -> Tensor:
    """Check a bool mask over patches, (B, N) or (B, *grid_shape), and return it as (B, N)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    shapes = list(dict.fromkeys([(batch, grid.num_patches), (batch, *grid.grid_shape)]))
    if tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    if value.dtype != torch.bool:
        raise ValueError(f"{name} must be of dtype torch.bool, got {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}")
    checks.same_device(name, value, device)
    return value.reshape(shapes[0])


def free_patches(known: object, batch: int, grid: Positions, device: torch.device) -> Tensor:
    """Return the patches (B, N) bool that are not known; all of them for None."""
    if known is None:
        return torch.ones(batch, grid.num_patches, dtype=torch.bool, device=device)
    return ~patch_mask("known", known, batch, grid, device)


def chain_ids(value: object, batch: int, device: torch.device) -> Tensor:
    """Check chain ids int64 (B,) and return a copy; 0..B-1 for None."""
    if value is None:
        return torch.arange(batch, device=device)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (batch,):
        raise ValueError(f"chain_ids must be an int64 tensor of shape ({batch},), got {checks.described(value)}")
    checks.same_device("chain_ids", value, device)
    if batch and not 0 <= int(value.min()) <= int(value.max()) <= philox.MAX_CHAIN_ID:
        raise ValueError(f"chain_ids must lie in 0..{philox.MAX_CHAIN_ID}, got {int(value.min())}..{int(value.max())}")
    return value.clone()  # a callback may change the caller's tensor


def counters(grid: Positions, sampling: Sampling | TokenSampling, first_iteration: int, iters: int) -> None:
    """Check that the random numbers' counters can hold every patch, value, step and iteration."""
    if grid.num_patches > philox.MAX_PATCHES:
        raise ValueError(f"model: at most {philox.MAX_PATCHES} patches can be counted, got {grid.num_patches}")
    if grid.patch_numel > philox.MAX_PATCH_NUMEL:
        raise ValueError(
            f"model: at most {philox.MAX_PATCH_NUMEL} numbers a patch can be counted, got {grid.patch_numel}"
        )
    steps = sampling.num_steps(grid.num_patches)
    if steps > philox.MAX_STEPS:
        raise ValueError(
            f"schedule: at most {philox.MAX_STEPS} steps can be counted, got up to {steps} from {sampling.schedule}"
        )
    last = first_iteration + iters - 1
    if last > philox.MAX_ITERATION:
        raise ValueError(f"first_iteration + iters: the last iteration can be {philox.MAX_ITERATION}, got {last}")
