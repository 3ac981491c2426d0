"""The lowest logit that top-k and top-p keep, for every slot.

    top-k      {v : fewer than k ids have a larger logit}
    covering   {v : the ids with a larger logit have less than top_p of the mass}      (the smallest set with top_p)
    inner      {v : the ids with a logit as large or larger have at most top_p of it}  (ReMDM's; the largest, always)

with mass(v) proportional to exp(l(v) / T), over what top-k keeps. Ids of the same logit are kept or left out together.

The sets are those of a sort, found without one: the lowest logit is bisected, with three pivots in a pass over the row,
in the integers that order floats: at most 16 passes in float32, 10 in float16, 8 in bfloat16. Counts, and masses as
multiples of 2^-40 of the largest, are integers: neither their sums nor the threshold depend on an order.

Shapes: logits (B, A, V) of any float dtype, rows contiguous; index (B, A) int32, -1 for padding; forbidden (V,) bool;
out (B, A) float32, which is -1e30, all ids, for padding.
Bytes that must move: s V for each slot that is not padding, for logits of s bytes; later passes find them in the cache.
Source: Holtzman et al. 2020 (covering); Wang et al. 2025 (inner, in the code of ReMDM).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ipr_fast.kernels.launch import contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.logits import CACHED, LOWEST, Rows, check_logits, check_temperature, read_logits

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

LANES = 1024  # ids that a program reads at once
MOST_SORTED = 1 << 9  # ids of a row that the twin sorts: 0.6 us a row of 10 ids, with histograms 370; equal near 800
UNUSED_BITS = {
    torch.float32: 0,
    torch.float16: 13,
    torch.bfloat16: 16,
}  # low bits, 0 in float32


@jit
def ordered(x, SHIFT: tl.constexpr):
    """Integers in the order of floats; floats differ in the bits from SHIFT up."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@jit
def unordered(key, SHIFT: tl.constexpr):
    """The float of an integer of `ordered`."""
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def above(
    p_row,
    p_forbidden,
    end,
    a,
    b,
    c,
    largest,
    inverse_temperature,
    COUNT: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    SHIFT: tl.constexpr,
    L_BLOCK: tl.constexpr,
):
    """The number, or the mass in 2^-40, of the ids above each of three pivots."""
    zeros = tl.zeros([L_BLOCK], tl.int32 if COUNT else tl.int64)
    of_a, of_b, of_c = zeros, zeros, zeros
    for v in range(0, end, L_BLOCK):
        o_id = v + tl.arange(0, L_BLOCK)
        logits = read_logits(p_row, p_forbidden, 0, o_id, o_id < end, end, FORBIDDEN)
        key = ordered(logits, SHIFT)
        if COUNT:
            number = (o_id < end).to(tl.int32)
        else:
            number = (tl.exp((logits - largest) * inverse_temperature) * 1099511627776.0).to(tl.int64)
            number = tl.where(o_id < end, number, 0)
        of_a += tl.where(key > a, number, 0)
        of_b += tl.where(key > b, number, 0)
        of_c += tl.where(key > c, number, 0)
    return tl.sum(of_a, axis=0).to(tl.int64), tl.sum(of_b, axis=0).to(tl.int64), tl.sum(of_c, axis=0).to(tl.int64)


@jit
def smallest_key(
    p_row,
    p_forbidden,
    end,
    low,
    high,
    bound,
    largest,
    inverse_temperature,
    COUNT: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    SHIFT: tl.constexpr,
    L_BLOCK: tl.constexpr,
):
    """The smallest key in low + 1..high above which there is less than `bound`; above `high` there is."""
    while high - low > 1:
        step = (high - low + 3) >> 2
        a, b, c = low + step, tl.minimum(low + 2 * step, high - 1), tl.minimum(low + 3 * step, high - 1)
        of_a, of_b, of_c = above(
            p_row,
            p_forbidden,
            end,
            a.to(tl.int32),
            b.to(tl.int32),
            c.to(tl.int32),
            largest,
            inverse_temperature,
            COUNT,
            FORBIDDEN,
            SHIFT,
            L_BLOCK,
        )
        low = tl.where(of_a < bound, low, tl.where(of_b < bound, a, tl.where(of_c < bound, b, c)))
        high = tl.where(of_a < bound, a, tl.where(of_b < bound, b, tl.where(of_c < bound, c, high)))
    return high


@jit
def threshold_kernel(
    p_logits,
    p_index,
    p_forbidden,
    p_out,
    inverse_temperature,
    k,
    part,
    A,
    V,
    CHAIN_STRIDE,
    SLOT_STRIDE,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    INNER: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    SHIFT: tl.constexpr,
    L_BLOCK: tl.constexpr,
):
    """One program a slot; part: top_p in 2^-30."""
    i_row = tl.program_id(0).to(tl.int64)
    end = tl.where(tl.load(p_index + i_row) >= 0, V, 0)
    p_row = p_logits + (i_row // A) * CHAIN_STRIDE + (i_row % A) * SLOT_STRIDE
    m = tl.full([L_BLOCK], -1.0e30, tl.float32)
    for v in range(0, end, L_BLOCK):
        o_id = v + tl.arange(0, L_BLOCK)
        m = tl.maximum(m, read_logits(p_row, p_forbidden, 0, o_id, o_id < end, end, FORBIDDEN))
    largest = tl.max(m, axis=0)
    high = ordered(largest, SHIFT).to(tl.int64)
    lowest = ordered(tl.min(tl.full([L_BLOCK], -1.0e30, tl.float32), axis=0), SHIFT).to(tl.int64)
    if TOP_K:
        lowest = smallest_key(
            p_row, p_forbidden, end, lowest - 1, high, k, largest, 1.0, True, FORBIDDEN, SHIFT, L_BLOCK
        )
    if TOP_P:
        low, inverse = (lowest - 1).to(tl.int32), inverse_temperature
        total, _, _ = above(p_row, p_forbidden, end, low, low, low, largest, inverse, False, FORBIDDEN, SHIFT, L_BLOCK)
        bound = (total >> 30) * part + (((total & 1073741823) * part) >> 30)
        bound = bound + 1 if INNER else tl.maximum(bound, 1)
        lowest = smallest_key(
            p_row, p_forbidden, end, lowest - 1, high, bound, largest, inverse, False, FORBIDDEN, SHIFT, L_BLOCK
        )
        if INNER:
            lowest = tl.minimum(lowest + 1, high)
    tl.store(p_out + i_row, tl.where(end > 0, unordered(lowest.to(tl.int32), SHIFT), -1.0e30))


def threshold(
    logits: Tensor,
    *,
    index: Tensor,
    out: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    nucleus: Literal["covering", "inner"] = "covering",
    forbidden: Tensor | None = None,
) -> Tensor:
    """Write the lowest logit kept of every slot to `out`, and return it. top_k: from 1; top_p: above 0, 1 for all."""
    logits = logits.detach()
    check_logits(logits)
    inverse = 1.0 / check_temperature(temperature, above_zero=True)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if nucleus not in ("covering", "inner"):
        raise ValueError(f'nucleus must be "covering" or "inner", got {nucleus!r}')
    k = None if top_k is None or top_k >= logits.shape[2] else top_k
    part = None if top_p == 1 else min(max(1, round(top_p * 2**30)), 2**30 - 1)
    if not runs_kernel(threshold_kernel, logits, out):
        _threshold(logits, index, out, inverse, k, part, nucleus == "inner", forbidden)
        return out
    contiguous(index=index, out=out, forbidden=forbidden)
    if index.numel() == 0:
        return out
    launch(
        threshold_kernel,
        (index.numel(),),
        logits,
        index,
        None if forbidden is None else forbidden.view(torch.int8),
        out,
        inverse,
        k or 0,
        part or 0,
        *logits.shape[1:],
        *logits.stride()[:2],
        TOP_K=k is not None,
        TOP_P=part is not None,
        INNER=nucleus == "inner",
        FORBIDDEN=forbidden is not None,
        SHIFT=UNUSED_BITS[logits.dtype],
        L_BLOCK=min(LANES, power_of_2(logits.shape[2], 32)),
        num_warps=16 if logits.shape[2] > 256 else 1,  # with 8, Triton before 3.7 takes the stack
    )
    return out


def _threshold(
    logits: Tensor,
    index: Tensor,
    out: Tensor,
    inverse: float,
    k: int | None,
    part: int | None,
    inner: bool,
    forbidden: Tensor | None,
) -> None:
    """The torch twin; part: top_p in 2^-30."""
    rows, position = logits.flatten(0, 1), index.flatten()
    at_once = max(1, CACHED // logits.shape[2])
    buffer = torch.empty(min(at_once, len(rows)), logits.shape[2], dtype=torch.float32, device=logits.device)
    for i in range(0, len(rows), at_once):
        own = slice(i, i + at_once)
        logit = buffer[: len(rows[own])]
        Rows(rows[own], forbidden).write(logit)
        key, lowest = _ordered(logit), _ordered(torch.full_like(logit[:, :1], LOWEST))
        if k is not None:
            lowest = _smallest_key(key, torch.ones_like(key), torch.full_like(lowest, k))
        if part is not None:
            largest, high = logit.amax(1, keepdim=True), key.amax(1, keepdim=True)
            mass = logit.sub_(largest).mul_(inverse).exp_().mul_(2.0**40).long()
            if k is not None:
                mass.masked_fill_(key < lowest, 0)
            total = mass.sum(1, keepdim=True)
            bound = (total >> 30) * part + ((total & (1 << 30) - 1) * part >> 30)
            smallest = _smallest_key(key, mass, bound + 1 if inner else bound.clamp(min=1))
            lowest = torch.minimum(smallest + 1, high) if inner else smallest
        out.view(-1)[own] = torch.where(position[own] >= 0, _unordered(lowest[:, 0]), LOWEST)


def _smallest_key(key: Tensor, number: Tensor, bound: Tensor) -> Tensor:
    """Return the smallest key (n, 1) above which the numbers (n, V) sum to less than `bound` (n, 1), from 1 to all."""
    return (_by_sort if key.shape[1] <= MOST_SORTED else _by_histograms)(key, number, bound)


def _by_sort(key: Tensor, number: Tensor, bound: Tensor) -> Tensor:
    ordered, ids = key.sort(1, descending=True)
    number = number.gather(1, ids)
    before = number.cumsum(1) - number
    return ordered.gather(1, (before < bound).sum(1, keepdim=True).clamp_(min=1) - 1)


def _by_histograms(key: Tensor, number: Tensor, bound: Tensor) -> Tensor:
    """A radix search: for a large vocabulary a fraction of the time of a sort."""
    found = torch.zeros_like(bound)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        bins = 1 << bits  # and one for the keys below those of `found`, and one for those above
        digit = ((key >> shift) - (found << bits)).clamp_(-1, bins).add_(1)
        sums = number.new_zeros(len(key), bins + 2).scatter_add_(1, digit, number)
        larger = sums.sum(1, keepdim=True) - sums.cumsum(1)
        found = found << bits | (larger[:, 1:-1] >= bound).sum(1, keepdim=True)
    return found


def _ordered(x: Tensor) -> Tensor:
    """Return integers from 0 to 2**32 - 1 in the order of floats."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().add_(1 << 31)


def _unordered(key: Tensor) -> Tensor:
    bits = (key - (1 << 31)).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
