"""Begin an iteration in one launch: choose the patches, list them as active slots, replace them by noise.

    key(b, n)   = word 0 of Philox(stream 3, patch n, iteration, chain b)
    mask(b, n)  = free(b, n) and fewer than size(b) free patches have a smaller (key, id)          (with a `choice`)
    index(b, a) = the a-th patch of the mask, or -1; count(b) the patches of the mask
    level(b, a) = 1, or 0 for padding; start(b, a) = -1, waiting; step(b) = -1, none done
    z(b, n)     = normals(stream, step 0, patch n, iteration, chain b)                             for active patches

Shapes: patches (B, N, P) float32; free, mask (B, N) bool; index, start (B, A) int32; level (B, A) float32; size, step,
chain_ids (B,) int64; iterations, seed () int64.
A patch's work is a key, its part in log2(N) counts, and noise if it is active: nothing grows with N squared.
Bytes that must move: 4 B A P of noise for A active patches per chain, 12 B A of slots, B N of masks, as many
more with a choice.
Source: Kang, Yoon, Ahn 2026; random numbers as in philox.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.philox import MAX_PATCHES, STREAM_CHOICE, normals_4, patch_keys, patch_normals, words_4
from ipr_fast.kernels.rows import compact, patch_rows, read_rows, write_rows

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


MAX_PROGRAM_PATCHES = 4096  # with more, the twin runs


class PatchChoice(NamedTuple):
    """A random choice to be made: `size` (B,) of each chain's `free` patches (B, N), by the keys of an iteration ().

    The mask that it is written to must not be `free` itself.
    """

    free: Tensor
    size: Tensor
    iteration: Tensor


@dataclass(frozen=True)
class Slots:
    """Buffers: index, start (B, A) int32, count (B,) int32, level (B, A) float32, step (B,) int64."""

    index: Tensor
    count: Tensor
    level: Tensor
    start: Tensor
    step: Tensor


@jit
def choice_key(patch, iteration, chain_id, seed):
    """A patch's key: word 0 of STREAM_CHOICE, 3."""
    key, _, _, _ = words_4(3 << 28, patch, iteration, chain_id, seed)
    return key


@jit
def smallest(candidates, key, o_patch, size):
    """Return a mask of the `size` candidates with the smallest keys, ties by patch; of all if they are fewer.

    A radix select: finds the bits of a threshold below which there are `size` of the 48-bit numbers (key, patch). It
    takes log2(N) counts in the mean where keys are random, and at most 48, as the numbers are distinct.
    """
    number = tl.where(candidates, (key.to(tl.int64) << 16) + o_patch, 1 << 48)
    size = tl.maximum(0, tl.minimum(size, tl.sum(candidates.to(tl.int32), axis=0)))
    threshold, bit, below = tl.full((), 0, tl.int64), tl.full((), 1 << 47, tl.int64), tl.full((), 0, tl.int32)
    while below != size:
        count = tl.sum((number < threshold + bit).to(tl.int32), axis=0)
        if count <= size:
            threshold += bit
            below = count
        bit = bit >> 1
    return number < threshold


@jit
def activate(
    p_mask,
    p_free,
    p_size,
    p_index,
    p_count,
    p_step,
    p_choice_iteration,
    i_chain,
    chain_id,
    seed,
    N,
    A,
    CHOOSE: tl.constexpr,
    N_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):
    """Choose a chain's active patches, if CHOOSE, and list them as slots; return their number.

    The index of padding slots is left to the caller.
    """
    if CHOOSE:
        o_patch = tl.arange(0, N_BLOCK)
        m_patch = o_patch < N
        iteration = tl.load(p_choice_iteration).to(tl.int32)
        free = tl.load(p_free + i_chain * N + o_patch, mask=m_patch, other=0) != 0
        key = choice_key(o_patch, iteration, chain_id, seed)
        chosen = smallest(free, key, o_patch, tl.load(p_size + i_chain).to(tl.int32))
        tl.store(p_mask + i_chain * N + o_patch, chosen.to(tl.int8), mask=m_patch)
        tl.debug_barrier()  # other threads of this program read the mask below

    count = tl.full((), 0, tl.int32)
    for n in range(0, N, T_BLOCK):
        o_tile = n + tl.arange(0, T_BLOCK)
        active = tl.load(p_mask + i_chain * N + o_tile, mask=o_tile < N, other=0) != 0
        b_slot = count + tl.cumsum(active.to(tl.int32), axis=0) - 1
        tl.store(p_index + i_chain * A + b_slot, o_tile, mask=active & (b_slot < A))
        count += tl.sum(active.to(tl.int32), axis=0)
    tl.store(p_count + i_chain, count)
    tl.store(p_step + i_chain, tl.full((), -1, tl.int64))
    tl.debug_barrier()  # and the slots
    return count


@jit
def renoise_kernel(
    p_patches,
    p_mask,
    p_free,
    p_size,
    p_index,
    p_count,
    p_level,
    p_start,
    p_step,
    p_iteration,
    p_choice_iteration,
    p_chain_ids,
    p_noise,
    p_seed,
    N,
    P,
    A,
    STREAM: tl.constexpr,
    CHOOSE: tl.constexpr,
    GIVEN: tl.constexpr,
    N_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
):
    """One program a chain."""
    i_chain = tl.program_id(0).to(tl.int64)
    chain_id, seed = tl.load(p_chain_ids + i_chain).to(tl.int32), tl.load(p_seed)
    count = activate(
        p_mask,
        p_free,
        p_size,
        p_index,
        p_count,
        p_step,
        p_choice_iteration,
        i_chain,
        chain_id,
        seed,
        N,
        A,
        CHOOSE,
        N_BLOCK,
        T_BLOCK,
    )

    iteration = tl.load(p_iteration).to(tl.int32)
    for a in range(0, A, A_BLOCK):
        o_slot = a + tl.arange(0, A_BLOCK)
        m_slot = o_slot < tl.minimum(count, A)
        o_out = i_chain * A + o_slot
        patch = tl.load(p_index + o_out, mask=m_slot, other=0)
        tl.store(p_index + o_out, tl.full([A_BLOCK], -1, tl.int32), mask=(o_slot >= count) & (o_slot < A))
        tl.store(p_level + o_out, m_slot.to(tl.float32), mask=o_slot < A)
        tl.store(p_start + o_out, tl.full([A_BLOCK], -1, tl.int32), mask=o_slot < A)
        row = (i_chain * N + patch) * P
        for q in range(0, tl.cdiv(P, 4), Q_BLOCK):
            o_element = 4 * q + tl.arange(0, 4 * Q_BLOCK)
            m_element = m_slot[:, None] & (o_element < P)[None, :]
            if GIVEN:
                noise = tl.load(p_noise + row[:, None] + o_element[None, :], mask=m_element, other=0.0)
            else:
                quad = (STREAM << 28) | (q + tl.arange(0, Q_BLOCK))[None, :]
                n0, n1, n2, n3 = normals_4(quad, patch[:, None], iteration, chain_id, seed)
                noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
            tl.store(p_patches + row[:, None] + o_element[None, :], noise, mask=m_element)


def renoise(
    patches: Tensor,
    mask: Tensor,
    slots: Slots,
    *,
    seed: Tensor,
    stream: int,
    iteration: Tensor,
    chain_ids: Tensor,
    choice: PatchChoice | None = None,
    noise: Tensor | None = None,
) -> None:
    """Make the patches of `mask` active and replace them by standard normals; every other patch keeps its bits.

    choice: choose the patches, and write them to `mask`. noise: (B, N, P), replaces the normals that seed and counters
    define.
    """
    if not runs_kernel(renoise_kernel, patches, noise) or patches.shape[1] > MAX_PROGRAM_PATCHES:
        _renoise(patches, mask, slots, seed, stream, iteration, chain_ids, choice, noise)
        return
    batch, num_patches, numel = patches.shape
    if batch == 0:
        return
    contiguous(patches=patches, mask=mask, chain_ids=chain_ids, noise=noise)
    contiguous(index=slots.index, count=slots.count, level=slots.level, start=slots.start, step=slots.step)
    if choice is not None:
        contiguous(free=choice.free, size=choice.size)
    num_slots = slots.index.shape[1]
    quads = power_of_2(-(-numel // 4))
    q_block, n_block = min(quads, 128), power_of_2(num_patches, 16)
    num_warps = 4 if n_block <= 512 else 16
    launch(
        renoise_kernel,
        (batch,),
        patches,
        mask.view(torch.int8),
        None if choice is None else choice.free.view(torch.int8),
        None if choice is None else choice.size,
        slots.index,
        slots.count,
        slots.level,
        slots.start,
        slots.step,
        iteration,
        None if choice is None else choice.iteration,
        chain_ids,
        noise,
        seed,
        num_patches,
        numel,
        num_slots,
        STREAM=stream,
        CHOOSE=choice is not None,
        GIVEN=noise is not None,
        N_BLOCK=n_block,
        T_BLOCK=min(n_block, 1024),
        A_BLOCK=min(power_of_2(num_slots, MIN_BLOCK), max(256, 32 * num_warps) // q_block),
        Q_BLOCK=q_block,
        num_warps=num_warps,
    )


def bytes_moved(batch: int, num_patches: int, slots: int, numel: int) -> int:
    """Return the bytes that must move: noise, slots, masks."""
    return batch * (4 * slots * numel + 12 * slots + num_patches)


def choose_patches(choice: PatchChoice, *, seed: Tensor | int, chain_ids: Tensor) -> Tensor:
    """Return a uniformly random choice as a mask (B, N): the free patches with the smallest keys."""
    num_patches = choice.free.shape[1]
    ids = torch.arange(num_patches, device=choice.free.device)
    keys = patch_keys(seed, STREAM_CHOICE, choice.iteration, chain_ids, num_patches) * MAX_PATCHES + ids  # ties by id
    rank = keys.masked_fill_(~choice.free, torch.iinfo(torch.int64).max).argsort(1).argsort(1)
    return (rank < choice.size[:, None]) & choice.free


def _renoise(
    patches: Tensor,
    mask: Tensor,
    slots: Slots,
    seed: Tensor,
    stream: int,
    iteration: Tensor,
    chain_ids: Tensor,
    choice: PatchChoice | None,
    noise: Tensor | None,
) -> None:
    """The torch twin."""
    if choice is not None:
        mask.copy_(choose_patches(choice, seed=seed, chain_ids=chain_ids))
    _, num_patches, numel = patches.shape
    compact(mask, slots.index, slots.count)
    occupied = slots.index >= 0
    slots.level.copy_(occupied)
    slots.start.fill_(-1)
    slots.step.fill_(-1)
    rows = patch_rows(slots.index, num_patches)
    if noise is None:
        values = patch_normals(seed, stream, 0, iteration, chain_ids, slots.index.clamp(min=0), numel)
    else:
        values = read_rows(noise, rows)
    write_rows(patches, rows, values, occupied)
