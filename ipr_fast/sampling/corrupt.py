"""Corrupted starts: finished samples with a known number of mistakes, for refinement to repair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.philox import STREAM_SWAP, patch_keys
from ipr_fast.sampling import arguments
from ipr_fast.sampling.patches import PatchGrid, patch_sides
from ipr_fast.sampling.tokens import TokenPositions


def swap_patches(
    x: Tensor,
    pairs: int,
    patch_size: int | Sequence[int],
    *,
    known: Tensor | None = None,
    seed: int = 0,
    chain_ids: Tensor | None = None,
) -> Tensor:
    """Swap `pairs` random pairs of patches in each sample: the K-corrupted start of Kang et al. 2026.

    x: float samples (B, C, ...) of 1 to 3 spatial dimensions, or int64 tokens (B, N), whose patches are single
        tokens; not written to.
    pairs: K >= 0; the 2 K patches of a sample all differ.
    patch_size: that of the model which is to repair the samples, an int or one for each spatial dimension; 1 for
        tokens.
    known: bool (B, N) or (B, *grid_shape), patches that stay in place.
    seed: int in [0, 2**64). chain_ids: int64 (B,) in [0, 2**32), default 0..B-1. A sample's pairs depend on seed and
        chain id alone.

    Returns samples of the shape, dtype and device of x. Raises ValueError for bad input, including samples with fewer
    than 2 K free patches.
    """
    is_tokens = isinstance(x, Tensor) and x.dtype == torch.int64 and x.ndim == 2
    grid: TokenPositions | PatchGrid
    if is_tokens:
        checks.integer("patch_size: that of tokens", patch_size, 1, 1)
        grid = TokenPositions(x.shape[1])
    else:
        checks.extremes("x", checks.samples("x", x))
        grid = PatchGrid.of(x.shape[1:], patch_sides("patch_size", patch_size, tuple(x.shape[2:])))
    x = x.detach()
    free = arguments.free_patches(known, len(x), grid, x.device)
    ids = arguments.chain_ids(chain_ids, len(x), x.device)
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    num_moved = 2 * checks.integer("pairs", pairs, 0)
    fewest_free = int(free.sum(1).min()) if len(x) else num_moved
    if num_moved > fewest_free:
        raise ValueError(
            f"pairs must be at most {fewest_free // 2}, half the free patches of every sample, got {pairs}"
        )
    keys = patch_keys(seed, STREAM_SWAP, 0, ids, grid.num_patches)
    moved = keys.masked_fill(~free, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)[:, :num_moved]
    partners = moved.unflatten(1, (-1, 2)).flip(2).flatten(1) if num_moved else moved
    patches = (grid.to_patches(x) if isinstance(grid, PatchGrid) else x).clone()
    chain = torch.arange(len(x), device=x.device)[:, None]
    patches[chain, moved] = patches[chain, partners]
    return grid.to_images(patches) if isinstance(grid, PatchGrid) else patches
