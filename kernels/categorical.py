"""Draw a token for every slot from its logits: Gumbel-max in two stages, in one pass over the vocabulary.

Over the ids v that are not forbidden and have l(v) >= threshold, in C = 256 classes v mod C:

    c     = argmax_c (log sum_{v = c mod C} exp(l(v) / T) + g(c))         g(n): Gumbel number n of the slot
    token = argmax_{v = c mod C} (l(v) / T + g(C + v // C))

which has exactly the law softmax(l / T), and takes C + V / C Gumbel numbers where one stage takes V: 750 for 126,464
ids, whose Philox rounds and logarithms would cost several times as much as reading the logits. The inverse of the
cumulative law would take two numbers, but a rounding of the logits would move all its V steps: here it changes the
token only where two scores are as close as the rounding. Ties go to the lowest class, then to the lowest id; T = 0
takes the largest logit of the lowest id.
With the largest logit m, R = sum exp(l - m) over the other ids, S = 1 + R and W = sum (l - m) exp(l - m):

    confidence      = p = exp(l(token) - m) / S                         of the logits without temperature and threshold
    odds            = (1 - p) / p                                       likewise, against the token
    gap             = 1 - (p1 - p2), of the two most probable ids       likewise
    entropy         = log1p(R) - W / S                                  likewise, in nats
    log_probability = log of the token's probability in the law that it was drawn from; 0 for T = 0

Odds, gap and entropy keep their relative precision where p rounds to 1. Forbidden ids are in none of these. A row with
NaN, with +inf, or without an allowed logit above -1e30 gives token -1 and NaN; a padding slot token -1 and 0, or, if
so asked, the statistics that it had.
A lane takes every 1024th id, and its m, R and W grow id by id: what is drawn does not depend on how many rows or ids a
program reads at once. At the end lanes are merged, four a class.

Shapes: logits (B, A, V) of any float dtype, rows contiguous; index (B, A) int32, the slots' positions, -1 for padding;
threshold (B, A) float32; forbidden (V,) bool; step, chain_ids (B,) int64; iteration, seed () int64; token (B, A)
int64, its statistics float32.
Bytes that must move: s V for each slot that is not padding, for logits of s bytes; forbidden ids stay in the cache.
Source: Maddison, Tarlow, Minka 2014 (Gumbel-max, also of sums); Milakov & Gimelshein 2018 (sums in one pass).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.gumbel import gumbels, log1p, row_gumbels
from ipr_fast.kernels.launch import contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.logits import LOWEST, Rows, check_logits, check_temperature, read_logits
from ipr_fast.kernels.philox import log

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

CLASSES = 256
LANES = 1024  # of a program; a class has four of them
MIN_CLASSES = 16  # of a smaller vocabulary: the power of two that holds it
UNROLLED = 4  # loads that a thread has in flight
MOST_ROWS = 1 << 12  # that the twin draws for at once


class Drawn(NamedTuple):
    """Buffers (B, A) for tokens, int64, and their statistics, float32."""

    token: Tensor
    log_probability: Tensor
    confidence: Tensor
    odds: Tensor
    gap: Tensor
    entropy: Tensor

    @classmethod
    def empty(cls, batch: int, slots: int, device: torch.device | str) -> Drawn:
        token = torch.empty(batch, slots, dtype=torch.int64, device=device)
        return cls(token, *(torch.empty(batch, slots, dtype=torch.float32, device=device) for _ in range(5)))


@jit
def extend(m, R, W, Z, first, logits, o_id, threshold, inverse_temperature, TEMPERED: tl.constexpr, OWN: tl.constexpr):
    """Take one more id into each lane; Z: the sum of exp((l - m) / T) over the ids from the threshold up, if OWN."""
    apart = logits - m
    grows = apart > 0
    e = tl.exp(-tl.abs(apart))
    W = tl.where(grows, (W - (R + 1.0) * apart) * e, W + apart * e)
    R = tl.where(grows, (R + 1.0) * e, R + e)
    if OWN:
        if TEMPERED:
            e = tl.exp(-tl.abs(apart) * inverse_temperature)
        Z = tl.where(grows, Z * e, Z) + tl.where(logits >= threshold, tl.where(grows, 1.0, e), 0.0)
    return tl.where(grows, logits, m), R, W, Z, tl.where(grows, o_id, first)


@jit
def first_highest(scores, o_number, limit):
    """The first number whose score is the highest of its row."""
    return tl.min(tl.where(scores == tl.max(scores, axis=1)[:, None], o_number, limit), axis=1)


@jit
def reported(statistic, valid, m_row):
    """NaN for logits that are not valid, 0 for padding."""
    return tl.where(m_row, tl.where(valid, statistic, float("nan")), 0.0)


@jit
def categorical_kernel(
    p_logits,
    p_index,
    p_threshold,
    p_forbidden,
    p_token,
    p_log_probability,
    p_confidence,
    p_odds,
    p_gap,
    p_entropy,
    p_step,
    p_iteration,
    p_chain_ids,
    p_seed,
    inverse_temperature,
    ROWS,
    A,
    V,
    CHAIN_STRIDE,
    SLOT_STRIDE,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    RESTRICTED: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    KEEPS: tl.constexpr,
    R_BLOCK: tl.constexpr,
    L_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    U_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK slots, with L_BLOCK lanes, C_BLOCK classes of K_BLOCK ids, U_BLOCK loads in flight."""
    i_row = tl.program_id(0).to(tl.int64) * R_BLOCK + tl.arange(0, R_BLOCK)
    i_chain, m_out = i_row // A, i_row < ROWS
    position = tl.load(p_index + i_row, mask=m_out, other=-1)
    m_row = position >= 0
    o_row = (i_chain * CHAIN_STRIDE + (i_row % A) * SLOT_STRIDE)[:, None]
    o_lane, o_class, o_member = tl.arange(0, L_BLOCK), tl.arange(0, C_BLOCK), tl.arange(0, K_BLOCK) * C_BLOCK
    o_lane, o_class, o_member = o_lane[None, :], o_class[None, :], o_member[None, :]
    threshold = tl.load(p_threshold + i_row, mask=m_row, other=0.0)[:, None] if RESTRICTED else -1.0e30

    m, first = tl.full([R_BLOCK, L_BLOCK], -1.0e30, tl.float32), tl.full([R_BLOCK, L_BLOCK], 0, tl.int32)
    R, W, Z = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for v in range(0, tl.where(tl.max(m_row.to(tl.int32), axis=0) > 0, V, 0), U_BLOCK * L_BLOCK):
        for u in tl.static_range(U_BLOCK):
            o_id = v + u * L_BLOCK + o_lane
            logits = read_logits(p_logits, p_forbidden, o_row, o_id, m_row[:, None], V, FORBIDDEN)
            m, R, W, Z, first = extend(
                m, R, W, Z, first, logits, o_id, threshold, inverse_temperature, TEMPERED, TEMPERED or RESTRICTED
            )
    largest = tl.max(m, axis=1)
    below = m - largest[:, None]
    top = tl.min(tl.where(m == largest[:, None], first, V), axis=1)
    W = tl.sum((W + (R + 1.0) * below) * tl.exp(below), axis=1)
    rest = tl.sum((R + tl.where(o_lane == (top % L_BLOCK)[:, None], 0.0, 1.0)) * tl.exp(below), axis=1)
    second = tl.max(tl.where(o_lane == (top % L_BLOCK)[:, None], -1.0e30, m), axis=1)
    if K_BLOCK > 1:
        o_id = (top % C_BLOCK)[:, None] + o_member
        logits = read_logits(p_logits, p_forbidden, o_row, o_id, m_row[:, None], V, FORBIDDEN)
        second = tl.maximum(second, tl.max(tl.where(o_id == top[:, None], -1.0e30, logits), axis=1))

    token, of_token, log_probability = top, largest, tl.zeros_like(largest)
    if not GREEDY:
        step = tl.load(p_step + i_chain, mask=m_row, other=0).to(tl.int32) + 1
        place = ((step << 16) | tl.maximum(position, 0))[:, None]
        iteration, seed = tl.load(p_iteration).to(tl.int32), tl.load(p_seed)
        chain_id = tl.load(p_chain_ids + i_chain, mask=m_row, other=0).to(tl.int32)[:, None]
        Z = (Z if TEMPERED or RESTRICTED else R + 1.0) * tl.exp(below * inverse_temperature)
        Z = tl.sum(tl.reshape(Z, [R_BLOCK, L_BLOCK // C_BLOCK, C_BLOCK]), axis=1)
        scores = log(tl.maximum(Z, 1.0e-37)) + gumbels(0, C_BLOCK, place, iteration, chain_id, seed)
        token = first_highest(tl.where(Z > 1.0e-37, scores, float("-inf")), o_class, C_BLOCK)
        if K_BLOCK > 1:
            o_id = token[:, None] + o_member
            logits = read_logits(p_logits, p_forbidden, o_row, o_id, m_row[:, None], V, FORBIDDEN)
            scores = (logits - largest[:, None]) * inverse_temperature
            scores += gumbels(C_BLOCK, K_BLOCK, place, iteration, chain_id, seed)
            token = first_highest(tl.where(logits >= threshold, scores, float("-inf")), o_id, V)
            of_token = tl.max(tl.where(o_id == token[:, None], logits, float("-inf")), axis=1)
        else:
            of_token = tl.max(tl.where(o_lane == token[:, None], m, float("-inf")), axis=1)
        log_probability = (of_token - largest) * inverse_temperature - log(tl.sum(Z, axis=1))

    valid = (largest > -1.0e30) & (largest < float("inf")) & (rest == rest)
    rest = tl.where(valid, rest, 1.0)
    total, weight = 1.0 + rest, tl.maximum(tl.exp(of_token - largest), 1.0e-30)
    odds = tl.where(token == top, rest, (1.0 + (rest - weight)) / weight)
    tl.store(p_token + i_row, tl.where(m_row & valid, token, -1).to(tl.int64), mask=m_out)
    m_out = m_row if KEEPS else m_out
    tl.store(p_log_probability + i_row, reported(log_probability, valid, m_row), mask=m_out)
    tl.store(p_confidence + i_row, reported(weight / total, valid, m_row), mask=m_out)
    tl.store(p_odds + i_row, reported(odds, valid, m_row), mask=m_out)
    tl.store(p_gap + i_row, reported((rest + tl.exp(second - largest)) / total, valid, m_row), mask=m_out)
    tl.store(p_entropy + i_row, reported(log1p(rest) - W / total, valid, m_row), mask=m_out)


def categorical(
    logits: Tensor,
    *,
    index: Tensor,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
    out: Drawn,
    temperature: float = 1.0,
    threshold: Tensor | None = None,
    forbidden: Tensor | None = None,
    keep: bool = False,
) -> Drawn:
    """Draw a token for every slot into `out`, and return it.

    step: the last step that was done; the token is of the next one. threshold: of `threshold.py`, for top-k and top-p.
    keep: leave the statistics of padding slots as they are.
    """
    logits = logits.detach()
    check_logits(logits)
    check_temperature(temperature)
    batch, slots, vocabulary = logits.shape
    counters = (seed, step, iteration, chain_ids)
    if not runs_kernel(categorical_kernel, logits, threshold):
        _categorical(logits, index, counters, out, temperature, threshold, forbidden, keep)
        return out
    contiguous(index=index, step=step, chain_ids=chain_ids, threshold=threshold, forbidden=forbidden, **out._asdict())
    if index.numel() == 0:
        return out
    lanes = min(LANES, power_of_2(vocabulary, MIN_CLASSES))
    classes = min(CLASSES, lanes)
    rows = LANES // lanes
    launch(
        categorical_kernel,
        (-(-batch * slots // rows),),
        logits,
        index,
        threshold,
        None if forbidden is None else forbidden.view(torch.int8),
        *out,
        step,
        iteration,
        chain_ids,
        seed,
        1.0 / temperature if temperature else 1.0,
        batch * slots,
        slots,
        vocabulary,
        *logits.stride()[:2],
        GREEDY=temperature == 0,
        TEMPERED=temperature not in (0, 1),
        RESTRICTED=threshold is not None and temperature != 0,
        FORBIDDEN=forbidden is not None,
        KEEPS=keep,
        R_BLOCK=rows,
        L_BLOCK=lanes,
        C_BLOCK=classes,
        K_BLOCK=power_of_2(-(-vocabulary // classes)),
        U_BLOCK=min(UNROLLED, power_of_2(-(-vocabulary // lanes))),
        num_warps=4 if temperature == 0 else 8,  # otherwise Triton before 3.7 takes the stack
    )
    return out


def _categorical(
    logits: Tensor,
    index: Tensor,
    counters: tuple[Tensor, ...],
    out: Drawn,
    temperature: float,
    threshold: Tensor | None,
    forbidden: Tensor | None,
    keep: bool = False,
) -> None:
    """The torch twin."""
    seed, step, iteration, chain_ids = counters
    position, slots, rows = index.flatten(), index.shape[1], logits.flatten(0, 1)
    place = ((step[:, None] + 1) * (1 << 16) + index.clamp(min=0)).flatten()
    limits = None if threshold is None or temperature == 0 else threshold.flatten()[:, None]
    for i in range(0, len(rows), MOST_ROWS):
        own = slice(i, i + MOST_ROWS)
        counter = (place[own], iteration, chain_ids.repeat_interleave(slots)[own], seed)
        limit = None if limits is None else limits[own]
        drawn = _draw(Rows(rows[own], forbidden), counter, temperature, limit)
        for buffer, values, padding in zip(out, drawn, (-1, 0, 0, 0, 0, 0), strict=True):
            other = buffer.view(-1)[own] if keep and buffer is not out.token else padding
            buffer.view(-1)[own] = torch.where(position[own] >= 0, values, other)


def _draw(rows: Rows, counter: tuple[Tensor, ...], temperature: float, threshold: Tensor | None) -> Drawn:
    inverse, vocabulary = 1 / temperature if temperature else 1.0, rows.logits.shape[1]
    classes = min(CLASSES, power_of_2(vocabulary, MIN_CLASSES))
    largest, top, second, R, W, Z = rows.sums(classes, inverse, threshold)
    token, of_token, log_probability = top, largest, torch.zeros_like(R)
    if temperature > 0:
        members = torch.arange(0, vocabulary, classes, device=Z.device)
        noise = row_gumbels(classes + (len(members) + 1) // 2 * 2, *counter)
        token = (Z.log() + noise[:, :classes]).argmax(1, keepdim=True)
        if vocabulary > classes:
            ids = token + members
            beyond = ids >= vocabulary
            logits = rows.of(ids.clamp(max=vocabulary - 1))
            scores = (logits - largest) * inverse + noise[:, classes : classes + len(members)]
            left_out = beyond if threshold is None else beyond | (logits < threshold)
            token = ids.gather(1, scores.masked_fill_(left_out, -torch.inf).argmax(1, keepdim=True))
        of_token = rows.of(token.clamp(max=vocabulary - 1))
        log_probability = (of_token - largest) * inverse - Z.sum(1, keepdim=True).log()
    S, weight = 1 + R, (of_token - largest).exp().clamp(min=1e-30)
    odds, gap = torch.where(token == top, R, (1 + (R - weight)) / weight), (R + second.exp()) / S
    statistics = (log_probability, weight / S, odds, gap, R.log1p() - W / S)
    valid = (largest > LOWEST) & (largest < torch.inf) & (R == R)
    drawn = (torch.where(valid, token, -1), *(torch.where(valid, x, torch.nan) for x in statistics))
    return Drawn(*(x[:, 0] for x in drawn))
