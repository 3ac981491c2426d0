"""Choosing the patches of an iteration, and replacing them by noise.

    key(b, n)  = word 0 of Philox(stream 3, patch n, iteration, chain b)
    mask(b, n) = free(b, n) and fewer than size(b) free patches have a smaller (key, id)
    z(b, n)    = normals(stream, step 0, patch n, iteration, chain b)   for the active patches

Shapes: patches (B, N, P) float32; free, mask (B, N) bool; index (B, A) int32, padded with -1.
Bytes that must move: 4 B A P written, plus 4 B A of index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.philox import MAX_PATCHES, STREAM_CHOICE, patch_keys, patch_normals
from ipr_fast.kernels.rows import patch_rows, write_rows


def choose_patches(free: Tensor, size: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
    """A uniformly random subset of `size` (B,) of each chain's free patches, as a mask (B, N)."""
    num_patches = free.shape[1]
    ids = torch.arange(num_patches, device=free.device)
    keys = patch_keys(seed, STREAM_CHOICE, iteration, chain_ids, num_patches) * MAX_PATCHES + ids  # ties by patch id
    rank = keys.masked_fill_(~free, torch.iinfo(torch.int64).max).argsort(1).argsort(1)
    return (rank < size[:, None]) & free


def renoise(
    patches: Tensor,
    index: Tensor,
    *,
    seed: int,
    stream: int,
    iteration: Tensor,
    chain_ids: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Replace the active patches by standard normals, in place; every other patch keeps its bits.

    noise: (B, A, P), to be used in place of the normals that seed and counters define.
    """
    if noise is None:
        noise = patch_normals(seed, stream, 0, iteration, chain_ids, index.clamp(min=0), patches.shape[-1])
    write_rows(patches, patch_rows(index, patches.shape[1]), noise, index >= 0)
