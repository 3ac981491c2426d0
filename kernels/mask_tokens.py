"""Begin an iteration of tokens in one launch: choose the positions, list them as active slots, mask them.

Positions are chosen and listed as `renoise` does with patches; then

    tokens(b, n) = mask_id      for active positions
    index(b, a)  = the a-th active position, or -1; count(b) their number; step(b) = -1, none done

Shapes: tokens (B, N) int64; free, mask (B, N) bool; index (B, A) int32; count (B,) int32; size, step, chain_ids (B,)
int64; iteration, seed () int64.
Bytes that must move: 12 B A of slots and masked tokens, B N of masks, as many more with a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.renoise import MAX_PROGRAM_PATCHES, PatchChoice, activate, choose_patches
from ipr_fast.kernels.rows import compact

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def mask_tokens_kernel(
    p_tokens,
    p_mask,
    p_free,
    p_size,
    p_index,
    p_count,
    p_step,
    p_choice_iteration,
    p_chain_ids,
    p_seed,
    MASK,
    N,
    A,
    CHOOSE: tl.constexpr,
    N_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
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
    for n in range(0, N, T_BLOCK):
        o_tile = n + tl.arange(0, T_BLOCK)
        active = tl.load(p_mask + i_chain * N + o_tile, mask=o_tile < N, other=0) != 0
        tl.store(p_tokens + i_chain * N + o_tile, tl.full([T_BLOCK], MASK, tl.int64), mask=active)
        padding = (o_tile >= count) & (o_tile < A)
        tl.store(p_index + i_chain * A + o_tile, tl.full([T_BLOCK], -1, tl.int32), mask=padding)


def mask_tokens(
    tokens: Tensor,
    mask: Tensor,
    *,
    index: Tensor,
    count: Tensor,
    step: Tensor,
    mask_id: int,
    chain_ids: Tensor,
    seed: Tensor,
    choice: PatchChoice | None = None,
) -> None:
    """Make the positions of `mask` active and mask them; every other position keeps its token.

    choice: choose the positions, and write them to `mask`.
    """
    if not runs_kernel(mask_tokens_kernel, tokens) or tokens.shape[1] > MAX_PROGRAM_PATCHES:
        _mask_tokens(tokens, mask, index, count, step, mask_id, chain_ids, seed, choice)
        return
    batch, length = tokens.shape
    if batch == 0:
        return
    contiguous(tokens=tokens, mask=mask, index=index, count=count, step=step, chain_ids=chain_ids)
    if choice is not None:
        contiguous(free=choice.free, size=choice.size)
    block = power_of_2(length, 16)
    launch(
        mask_tokens_kernel,
        (batch,),
        tokens,
        mask.view(torch.int8),
        None if choice is None else choice.free.view(torch.int8),
        None if choice is None else choice.size,
        index,
        count,
        step,
        None if choice is None else choice.iteration,
        chain_ids,
        seed,
        mask_id,
        length,
        index.shape[1],
        CHOOSE=choice is not None,
        N_BLOCK=block,
        T_BLOCK=min(block, 1024),
        num_warps=4 if block <= 512 else 16,
    )


def bytes_moved(batch: int, length: int, slots: int) -> int:
    """Return the bytes that must move: slots, masked tokens and masks."""
    return batch * (12 * slots + length)


def _mask_tokens(
    tokens: Tensor,
    mask: Tensor,
    index: Tensor,
    count: Tensor,
    step: Tensor,
    mask_id: int,
    chain_ids: Tensor,
    seed: Tensor,
    choice: PatchChoice | None,
) -> None:
    """The torch twin."""
    if choice is not None:
        mask.copy_(choose_patches(choice, seed=seed, chain_ids=chain_ids))
    compact(mask, index, count)
    step.fill_(-1)
    tokens.masked_fill_(mask, mask_id)
