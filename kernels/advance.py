"""Advance the schedule by one step: start the next patches and compute every slot's next level.

At step s of a chain with n active patches, T steps, block length L and starts S_k:

    due   = #{k : S_k <= s}
    start = s   for the (due - started) waiting slots of lowest log-variance (NaN is the highest), ties by slot
    t     = clamp((L - (s + 1 - start)) / L, 0, 1)
    level = shift t / (1 + (shift - 1) t)                   for started slots; 1 for waiting ones; 0 once s + 1 >= T
    row   = #{r : levels(r) < level}                        where a network looks levels up in a table
    mean  = (mean (k - 1) + log-variance) / k               after k steps that denoised the slot, if it is asked for; an
                                                            infinite one counts as float32's largest

Shapes: level, previous_level, log_variance, mean (B, A) float32; start (B, A) int32, -1 while waiting; row (B, A)
int64; count (B,) int32; step (B,) int64; levels (R,) float32, ascending. The tables are those of `ScheduleTables`:
steps, block (N + 1,), starts (N + 1, N), int32, and shift (1,), float32.
Bytes that must move: 24 B A (start and level read and written, log-variance read, previous level written), 8 B A for
rows, 8 B A for means; the tables, 4 N for each chain, and the levels stay in cache.
Source: Kang, Yoon, Ahn 2026, and their code, whose rounding the tables keep; the shift is Esser et al. 2024's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, rows_of, runs_kernel
from ipr_fast.kernels.slot_inputs import row_of

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def advance_kernel(
    p_start,
    p_level,
    p_previous_level,
    p_count,
    p_step,
    p_log_variance,
    p_steps,
    p_block,
    p_starts,
    p_shift,
    p_row,
    p_levels,
    p_mean,
    N,
    A,
    R,
    LOG_VARIANCE_STRIDE,
    HAS_LOG_VARIANCE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    R_BITS: tl.constexpr,
    A_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """One program a chain."""
    i_chain = tl.program_id(0).to(tl.int64)
    o_slot = tl.arange(0, A_BLOCK)
    count, step = tl.load(p_count + i_chain), tl.load(p_step + i_chain).to(tl.int32) + 1
    m_slot = (o_slot < count) & (o_slot < A)
    b_start = tl.load(p_start + i_chain * A + o_slot, mask=m_slot, other=0)

    o_patch = tl.arange(0, N_BLOCK)
    b_starts = tl.load(p_starts + count.to(tl.int64) * N + o_patch, mask=o_patch < N, other=2147483647)
    due = tl.sum((b_starts <= step).to(tl.int32), axis=0)
    waiting = m_slot & (b_start < 0)
    to_start = due - tl.sum((m_slot & (b_start >= 0)).to(tl.int32), axis=0)
    to_start = tl.minimum(to_start, tl.sum(waiting.to(tl.int32), axis=0))

    b_order = o_slot.to(tl.float32)
    if HAS_LOG_VARIANCE:
        o_order = (i_chain * A + o_slot) * LOG_VARIANCE_STRIDE
        m_order = m_slot if HAS_MEAN else waiting
        b_log_variance = tl.load(p_log_variance + o_order, mask=m_order, other=0.0).to(tl.float32)
        b_order = b_log_variance
        b_order = tl.where(b_order != b_order, 3.4028234663852886e38, b_order)
        b_order = tl.minimum(tl.maximum(b_order, -3.4028234663852886e38), 3.4028234663852886e38)
    for _ in range(to_start):  # mostly 0 or 1: starts are spread over the steps
        b_waiting = tl.where(waiting, b_order, float("inf"))
        lowest = tl.min(b_waiting, axis=0)
        slot = tl.min(tl.where(waiting & (b_waiting == lowest), o_slot, A_BLOCK), axis=0)
        b_start = tl.where(o_slot == slot, step, b_start)
        waiting = waiting & (o_slot != slot)
    tl.store(p_start + i_chain * A + o_slot, b_start, mask=m_slot)

    o_level = i_chain * A + o_slot
    b_previous = tl.load(p_level + o_level, mask=o_slot < A)
    tl.store(p_previous_level + o_level, b_previous, mask=o_slot < A)
    length, steps = tl.load(p_block + count), tl.load(p_steps + count)
    b_level = tl.div_rn((length - (step + 1 - b_start)).to(tl.float32), tl.maximum(length, 1).to(tl.float32))
    b_level = tl.minimum(tl.maximum(b_level, 0.0), 1.0)
    shift = tl.load(p_shift)
    b_level = tl.minimum(tl.div_rn(shift * b_level, 1.0 + (shift - 1.0) * b_level), 1.0)
    b_level = tl.where(b_start < 0, 1.0, b_level)
    b_level = tl.where(m_slot & (step + 1 < steps), b_level, 0.0)
    tl.store(p_level + o_level, b_level, mask=o_slot < A)
    if HAS_MEAN:
        moves = m_slot & (b_start >= 0) & (b_previous > 0)
        b_log_variance = tl.where(b_log_variance == float("inf"), 3.4028234663852886e38, b_log_variance)
        b_log_variance = tl.where(b_log_variance == float("-inf"), -3.4028234663852886e38, b_log_variance)
        number, b_mean = step + 1 - b_start, tl.load(p_mean + o_level, mask=moves, other=0.0)
        b_mean = tl.where(number > 1, b_mean, b_log_variance)
        b_mean += tl.div_rn(b_log_variance - b_mean, tl.maximum(number, 1).to(tl.float32))
        tl.store(p_mean + o_level, b_mean, mask=moves)
    if R_BITS > 0:
        tl.store(p_row + o_level, row_of(b_level, p_levels, R, R_BITS), mask=o_slot < A)
    tl.debug_barrier()  # all threads of this program have read the step
    tl.store(p_step + i_chain, step.to(tl.int64))


def advance(
    start: Tensor,
    level: Tensor,
    previous_level: Tensor,
    *,
    count: Tensor,
    step: Tensor,
    log_variance: Tensor | None,
    steps: Tensor,
    block: Tensor,
    starts: Tensor,
    shift: Tensor,
    row: Tensor | None = None,
    levels: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """Do one step more than `step`, the last one that was done: update it, `start`, `level` and `previous_level`.

    Padding slots get level 0. Without log_variance, slots start in order. row: updated too, its levels being `levels`.
    mean: updated too, the mean log-variance over the steps that denoised a slot; needs log_variance.
    """
    assert mean is None or log_variance is not None, "a mean of log-variances"
    if not runs_kernel(advance_kernel, start, log_variance):
        _advance(
            start, level, previous_level, count, step, log_variance, steps, block, starts, shift, row, levels, mean
        )
        return
    batch, slots = start.shape
    if start.numel() == 0:
        step.add_(1)
        return
    contiguous(start=start, level=level, previous_level=previous_level, count=count, step=step, starts=starts)
    contiguous(row=row, levels=levels, mean=mean)
    order, stride = (None, 0) if log_variance is None else rows_of(log_variance[..., None])
    num_patches = starts.shape[1]
    launch(
        advance_kernel,
        (batch,),
        start,
        level,
        previous_level,
        count,
        step,
        order,
        steps,
        block,
        starts,
        shift,
        row,
        levels,
        mean,
        num_patches,
        slots,
        0 if levels is None else len(levels),
        stride,
        HAS_LOG_VARIANCE=order is not None,
        HAS_MEAN=mean is not None,
        R_BITS=0 if row is None or levels is None else len(levels).bit_length(),
        A_BLOCK=power_of_2(slots, MIN_BLOCK),
        N_BLOCK=power_of_2(num_patches),
        enable_fp_fusion=False,  # a fused product and sum would be another level than the table's
        num_warps=1 if num_patches <= 128 else min(16, max(4, power_of_2(num_patches) // 128)),
    )


def bytes_moved(batch: int, slots: int, rows: bool = False) -> int:
    """Return the bytes that must move, with rows or without; the tables stay in cache."""
    return (32 if rows else 24) * batch * slots


def _advance(
    start: Tensor,
    level: Tensor,
    previous_level: Tensor,
    count: Tensor,
    step: Tensor,
    log_variance: Tensor | None,
    steps: Tensor,
    block: Tensor,
    starts: Tensor,
    shift: Tensor,
    row: Tensor | None = None,
    levels: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """The torch twin."""
    previous_level.copy_(level)
    step = step.add_(1)[:, None]
    occupied = torch.arange(start.shape[1], device=start.device) < count[:, None]
    waiting = (start < 0) & occupied
    started = ((start >= 0) & occupied).sum(1, keepdim=True)
    count = count.long()
    due = (starts[count] <= step).sum(1, keepdim=True)
    if log_variance is None:
        rank = waiting.cumsum(1) - 1
    else:
        # A waiting slot with an infinite or NaN log-variance still comes before slots that do not wait.
        largest = torch.finfo(torch.float32).max
        order = log_variance.float().nan_to_num(nan=largest).masked_fill(~waiting, torch.inf)
        rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    starts_now = waiting & (rank < due - started)
    start.copy_(torch.where(starts_now, step.to(start.dtype), start))

    length = block[count][:, None]
    left = ((length - (step + 1 - start)).float() / length).clamp_(0, 1)
    left = torch.where(start < 0, 1.0, (shift * left / (1 + (shift - 1) * left)).clamp_(max=1))
    running = (step + 1 < steps[count][:, None]) & occupied
    level.copy_(torch.where(running, left, 0.0))
    if mean is not None and log_variance is not None:
        moves, number = (start >= 0) & (previous_level > 0), step + 1 - start
        log_variance = log_variance.float().nan_to_num(nan=torch.nan)
        before = torch.where(number > 1, mean, log_variance)
        torch.where(moves, before + (log_variance - before) / number.clamp(min=1), mean, out=mean)
    if row is not None and levels is not None:
        row.copy_(torch.searchsorted(levels, level))
