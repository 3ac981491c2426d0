"""Slots and their patches as rows of a buffer: helpers that the torch twins share.

Shapes: patches (B, N, P), seen as (B * N, P); index (B, A) int32, padded with -1; rows (B, A) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compact(mask: Tensor, index: Tensor, count: Tensor) -> None:
    """Write the patches of mask (B, N) to index (B, A) int32, ascending and then -1, and their number to count (B,)."""
    batch, num_patches = mask.shape
    slots = index.shape[1]
    slot = torch.where(mask, mask.cumsum(1) - 1, slots)  # patches that are not active go to a spare column
    ids = torch.arange(num_patches, dtype=torch.int32, device=mask.device).expand(batch, -1)
    padded = torch.full((batch, slots + 1), -1, dtype=torch.int32, device=mask.device)
    index.copy_(padded.scatter_(1, slot.clamp_(max=slots), ids)[:, :slots])
    count.copy_(mask.sum(1))


def patch_rows(index: Tensor, num_patches: int) -> Tensor:
    """Return the row (B, A) of each slot's patch; padding slots get the row of their chain's patch 0."""
    chain = torch.arange(len(index), device=index.device)[:, None]
    return index.clamp(min=0) + chain * num_patches


def read_rows(patches: Tensor, rows: Tensor) -> Tensor:
    """Return the values (B, A, P) of rows (B, A) of patches (B, N, P), seen as (B * N, P)."""
    numel = patches.shape[-1]
    return patches.reshape(-1, numel).index_select(0, rows.flatten()).view(*rows.shape, numel)


def write_rows(patches: Tensor, rows: Tensor, values: Tensor, occupied: Tensor) -> None:
    """Write values (B, A, P) to rows (B, A) of patches (B, N, P), seen as (B * N, P); padding slots change nothing.

    The buffer has no spare row for padding. Padding slots repeat their chain's slot 0, row and values, so the order of
    writes does not matter; in a chain without active patches they rewrite patch 0 unchanged.
    """
    if rows.shape[1] == 0:
        return
    flat = patches.view(-1, patches.shape[-1])
    first = torch.where(occupied[:, :1, None], values[:, :1], patches[:, :1])
    rows = torch.where(occupied, rows, rows[:, :1])
    values = torch.where(occupied[..., None], values, first)
    flat.index_copy_(0, rows.flatten(), values.flatten(0, 1))
