"""Which tokens of a chain are context: a mask for attention among them, and the slots of the others.

    bias(b, n) = -inf for active tokens, 0 for context tokens; 0 for all in a chain without context
    slot(b, n) = a where index(b, a) = n, -1 for context tokens

In a chain without context tokens attend to each other: a softmax over no key is NaN.

Shapes: index (B, A) int32, -1 in padding slots; count (B,) int32, the active tokens; slot (B, N + 1) int32, whose last
column is spare; bias (B, C) with C - N columns more.
Bytes that must move: 4 B A + (s + 4) B N for a bias of s bytes a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def context_mask_kernel(p_index, p_count, p_slot, p_bias, A, N, C, A_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr):
    """One program a chain."""
    i_chain = tl.program_id(0).to(tl.int64)
    p_slot += i_chain * (N + 1)
    p_bias += i_chain * C
    of_active = tl.where(tl.load(p_count + i_chain) < N, float("-inf"), 0.0)
    for n in range(0, C, N_BLOCK):
        o_token = n + tl.arange(0, N_BLOCK)
        tl.store(p_slot + o_token, tl.full([N_BLOCK], -1, tl.int32), mask=o_token < N)
        tl.store(p_bias + o_token, tl.zeros([N_BLOCK], tl.float32), mask=o_token < C)
    tl.debug_barrier()  # other threads of this program write to the same places below
    for a in range(0, A, A_BLOCK):
        o_slot = a + tl.arange(0, A_BLOCK)
        i_token = tl.load(p_index + i_chain * A + o_slot, mask=o_slot < A, other=-1)
        tl.store(p_slot + i_token, o_slot, mask=i_token >= 0)
        tl.store(p_bias + i_token, tl.zeros([A_BLOCK], tl.float32) + of_active, mask=i_token >= 0)


def context_mask(index: Tensor, count: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
    """Write `slot`; return the bias (B, 1, 1, N) of `dtype`.

    The bias is a slice of rows of a multiple of 16 numbers, else torch's attention would make them so in every layer.
    """
    (batch, slots), num_tokens = index.shape, slot.shape[1] - 1
    columns = -(-(num_tokens + 1) // 16) * 16
    if not runs_kernel(context_mask_kernel, index):
        return _context_mask(index, count, slot, columns, dtype)
    contiguous(index=index, count=count, slot=slot)
    bias = torch.empty(batch, columns, dtype=dtype, device=index.device)
    if batch > 0:
        a_block, n_block = (min(1024, power_of_2(each, MIN_BLOCK)) for each in (slots, columns))
        launch(
            context_mask_kernel,
            (batch,),
            index,
            count,
            slot,
            bias,
            slots,
            num_tokens,
            columns,
            A_BLOCK=a_block,
            N_BLOCK=n_block,
            num_warps=1 if n_block <= 256 else 4,
        )
    return bias[:, None, None, :num_tokens]


def bytes_moved(batch: int, slots: int, tokens: int, size: int) -> int:
    """Return the bytes that must move, for a bias of `size` bytes a number."""
    return batch * (4 * slots + (size + 4) * tokens)


def _context_mask(index: Tensor, count: Tensor, slot: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The torch twin."""
    num_tokens = slot.shape[1] - 1
    place = torch.remainder(index, num_tokens + 1).long()  # padding, -1, goes to the spare column
    slots = torch.arange(index.shape[1], dtype=torch.int32, device=index.device)
    slot.fill_(-1).scatter_(1, place, slots.expand_as(place))
    bias = torch.zeros(len(place), columns, dtype=dtype, device=place.device)
    bias.scatter_(1, place, -torch.inf).masked_fill_((count == num_tokens)[:, None], 0.0)
    return bias[:, None, None, :num_tokens]
