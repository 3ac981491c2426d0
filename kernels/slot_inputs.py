"""The inputs of a network that computes the active slots only: their patches, and their rows in tables and caches.

The engine makes them when an iteration begins. From then on `denoise` writes the values that it moves, and `advance`
the rows, so that a step has no launch for them.

    values(b, a) = patches(b, index(b, a)), in the network's dtype; of patch 0 for padding, whose index is -1
    row(b, a)    = #{r : levels(r) < level(b, a)}, the row of the level in a table for ascending levels
    place(b, a)  = b N + index(b, a), the row in a cache of B N + 1 rows; B N for padding

Shapes: patches (B, N, P) float32; index (B, A) int32; level (B, A), levels (R,) float32; values (B, A, P); row, place
(B, A) int64.
Bytes that must move, for values of s bytes: (4 + s) B A P + 24 B A; the levels stay in cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.rows import patch_rows, read_rows

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


class SlotInputs(NamedTuple):
    """values (B, A, P); row, place (B, A) int64."""

    values: Tensor
    row: Tensor
    place: Tensor

    @classmethod
    def allocate(
        cls, batch: int, slots: int, num_patches: int, numel: int, dtype: torch.dtype, device: torch.device
    ) -> SlotInputs:
        """Allocate the inputs, of zeros at the places of patch 0: a chain that is never filled touches no other's."""
        row = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        place = row + num_patches * torch.arange(batch, device=device)[:, None]
        return cls(torch.zeros(batch, slots, numel, dtype=dtype, device=device), row, place)

    def first(self, chains: int) -> SlotInputs:
        """Return views of the first chains; the place of padding stays behind the last chain of all."""
        return SlotInputs(*(each[:chains] for each in self))


@jit
def row_of(b_level, p_levels, R, R_BITS: tl.constexpr):
    """Return how many of R ascending levels lie below each level of a block, (S,) int64; R < 2**R_BITS."""
    below = tl.zeros_like(b_level).to(tl.int64)
    for i in tl.static_range(R_BITS):  # a binary search
        probe = below + (1 << (R_BITS - 1 - i))
        b_probe = tl.load(p_levels + probe - 1, mask=probe <= R, other=float("inf"))
        below = tl.where(b_probe < b_level, probe, below)
    return below


@jit
def slot_inputs_kernel(
    p_patches,
    p_index,
    p_level,
    p_levels,
    p_values,
    p_row,
    p_place,
    SLOTS,
    A,
    N,
    P,
    R,
    SPARE,
    S_BLOCK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    R_BITS: tl.constexpr,
):
    """One program for S_BLOCK slots, of one or several chains, and E_BLOCK elements of their patches."""
    blocks = tl.cdiv(P, E_BLOCK)
    i_block = tl.program_id(0) % blocks
    i_slot = (tl.program_id(0) // blocks).to(tl.int64) * S_BLOCK + tl.arange(0, S_BLOCK)
    m_slot = i_slot < SLOTS
    patch = tl.load(p_index + i_slot, mask=m_slot, other=0)
    i_patch = i_slot // A * N + tl.maximum(patch, 0)
    o_element = i_block * E_BLOCK + tl.arange(0, E_BLOCK)[None, :]
    m_element = m_slot[:, None] & (o_element < P)
    b_value = tl.load(p_patches + i_patch[:, None] * P + o_element, mask=m_element, other=0.0)
    tl.store(p_values + i_slot[:, None] * P + o_element, b_value, mask=m_element)
    if i_block == 0:
        tl.store(p_place + i_slot, tl.where(patch < 0, SPARE, i_patch), mask=m_slot)
        b_level = tl.load(p_level + i_slot, mask=m_slot, other=0.0)
        tl.store(p_row + i_slot, row_of(b_level, p_levels, R, R_BITS), mask=m_slot)


def slot_inputs(
    patches: Tensor, index: Tensor, level: Tensor, levels: Tensor, dtype: torch.dtype, out: SlotInputs | None = None
) -> SlotInputs:
    """Return the inputs, values in `dtype`; in `out`, if given, whose values have that type."""
    if not runs_kernel(slot_inputs_kernel, patches, level):
        return _slot_inputs(patches, index, level, levels, dtype, out)
    (batch, slots), (_, num_patches, numel) = index.shape, patches.shape
    if out is None:
        values = torch.empty(batch, slots, numel, dtype=dtype, device=patches.device)
        out = SlotInputs(
            values, *(torch.empty(batch, slots, dtype=torch.int64, device=patches.device) for _ in range(2))
        )
    if out.values.numel() == 0:
        return out
    contiguous(values=out.values, row=out.row, place=out.place)
    e_block = min(power_of_2(numel, MIN_BLOCK), 1024)
    s_block = max(MIN_BLOCK, 1024 // e_block)
    launch(
        slot_inputs_kernel,
        (-(-batch * slots // s_block) * -(-numel // e_block),),
        patches.contiguous(),
        index.contiguous(),
        level.contiguous(),
        levels.contiguous(),
        *out,
        batch * slots,
        slots,
        num_patches,
        numel,
        len(levels),
        batch * num_patches,
        S_BLOCK=s_block,
        E_BLOCK=e_block,
        R_BITS=len(levels).bit_length(),
        num_warps=4,
    )
    return out


def bytes_moved(batch: int, slots: int, numel: int, size: int) -> int:
    """Return the bytes that must move, for values of `size` bytes."""
    return batch * slots * ((4 + size) * numel + 24)


def _slot_inputs(
    patches: Tensor, index: Tensor, level: Tensor, levels: Tensor, dtype: torch.dtype, out: SlotInputs | None = None
) -> SlotInputs:
    """The torch twin."""
    batch, num_patches, _ = patches.shape
    rows = patch_rows(index, num_patches)
    place = torch.where(index >= 0, rows, batch * num_patches)
    inputs = SlotInputs(read_rows(patches, rows).to(dtype), torch.searchsorted(levels, level), place)
    if out is None:
        return inputs
    return SlotInputs(*(own.copy_(new) for own, new in zip(out, inputs, strict=True)))
