"""Reveal drawn tokens, and mask visible ones again, in one launch a step.

At step s of a chain with n active positions, of which `masked` hold the mask and `visible` hold a token:

    remasked = visible positions with keys7 < 2^32 sigma(n, s), times softmax(-psi) over them if BY_PSI
    revealed = the (target(n, s) - |visible| + |remasked|) masked positions of lowest score, ties by position
               or, with `reveal`, those with keys6 < 2^32 reveal(n, s)
    token    = the drawn one where revealed, the mask where remasked
    psi      = the drawn token's confidence where revealed, if KEEPS_PSI
    hidden   = the positions of the slots that are masked now, else -1: what the next step has to draw

keys6 and keys7 are word 0 of Philox in streams 6 and 7. Without a score, positions come in the order of keys6.

Shapes: tokens (B, N) int64; index, hidden (B, A) int32, padded with -1; count (B,) int32; drawn (B, A) int64;
score >= 0, psi, confidence (B, A) float32; step, chain_ids (B,) int64; iteration, seed () int64. The tables are those
of `TokenTables`, of N + 1 rows.
Bytes that must move: 24 B A (slots, drawn and present tokens, scores), 4 B A more for each of `hidden`, psi and
confidence, and 8 for each token that changes.
Source: Sahoo et al. 2024 (MDLM), Nie et al. 2025 (LLaDA), Wang et al. 2025 (ReMDM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.philox import STREAM_ORDER, STREAM_REMASK, step_keys, words_4
from ipr_fast.kernels.renoise import smallest
from ipr_fast.kernels.rows import patch_rows, write_rows

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

MAX_PROGRAM_SLOTS = 4096  # with more, the twin runs
KEYS = 1 << 32


@jit
def key_of(stream, step, patch, iteration, chain_id, seed):
    """Word 0 of a stream for patches in a step, as int64."""
    key, _, _, _ = words_4(stream << 28, (step << 16) | patch, iteration, chain_id, seed)
    return key.to(tl.int64)


@jit
def key_bound(probability):
    """How many of the 2**32 keys make an event of this probability happen."""
    return (probability * 4294967296.0).to(tl.int64)


@jit
def reveal_kernel(
    p_tokens,
    p_index,
    p_count,
    p_drawn,
    p_score,
    p_confidence,
    p_psi,
    p_hidden,
    p_visible,
    p_reveal,
    p_sigma,
    p_step,
    p_iteration,
    p_chain_ids,
    p_seed,
    MASK,
    N,
    A,
    T,
    COUNTS: tl.constexpr,
    SCORES: tl.constexpr,
    REMASKS: tl.constexpr,
    BY_PSI: tl.constexpr,
    KEEPS_PSI: tl.constexpr,
    LISTS: tl.constexpr,
    A_BLOCK: tl.constexpr,
):
    """One program a chain."""
    i_chain = tl.program_id(0).to(tl.int64)
    o_slot = tl.arange(0, A_BLOCK)
    step, iteration = tl.load(p_step + i_chain).to(tl.int32) + 1, tl.load(p_iteration).to(tl.int32)
    chain_id, seed = tl.load(p_chain_ids + i_chain).to(tl.int32), tl.load(p_seed)
    o_table = tl.load(p_count + i_chain).to(tl.int64) * T + tl.minimum(step, T - 1)
    o_in = i_chain * A + o_slot
    patch = tl.load(p_index + o_in, mask=o_slot < A, other=-1)
    occupied = patch >= 0
    p_token = p_tokens + i_chain * N + tl.maximum(patch, 0)
    masked = occupied & (tl.load(p_token, mask=occupied, other=MASK) == MASK)
    visible = occupied & (masked == 0)

    remasked = visible & (o_slot < 0)
    if REMASKS:
        probability = tl.load(p_sigma + o_table) + tl.zeros([A_BLOCK], tl.float32)
        if BY_PSI:
            weight = tl.load(p_psi + o_in, mask=visible, other=0.0)
            lowest = tl.min(tl.where(visible, weight, float("inf")), axis=0)
            weight = tl.where(visible, tl.exp(lowest - weight), 0.0)
            probability = probability * tl.div_rn(weight, tl.maximum(tl.sum(weight, axis=0), 1.0))
        remasked = visible & (key_of(7, step, patch, iteration, chain_id, seed) < key_bound(probability))

    candidates = masked & (tl.load(p_drawn + o_in, mask=masked, other=-1) >= 0)
    if COUNTS:
        number = tl.load(p_visible + o_table) - tl.sum(visible.to(tl.int32), axis=0)
        number += tl.sum(remasked.to(tl.int32), axis=0)
        if SCORES:
            score = tl.load(p_score + o_in, mask=masked, other=0.0)
            key = tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            key = tl.where(score != score, 0x7FFFFFFF, key)
        else:
            key = key_of(6, step, patch, iteration, chain_id, seed)
        revealed = smallest(candidates, key, o_slot, number)
    else:
        bound = key_bound(tl.load(p_reveal + o_table))
        revealed = candidates & (key_of(6, step, patch, iteration, chain_id, seed) < bound)

    if LISTS:
        hides = (masked & (revealed == 0)) | remasked
        tl.store(p_hidden + o_in, tl.load(p_index + o_in, mask=hides, other=-1), mask=o_slot < A)
    drawn = tl.load(p_drawn + o_in, mask=revealed, other=MASK)  # as the index, again: registers are few
    tl.store(p_token, drawn, mask=revealed | remasked)
    if KEEPS_PSI:
        confidence = tl.load(p_confidence + o_in, mask=revealed, other=0.0)
        tl.store(p_psi + o_in, confidence, mask=revealed)
    tl.debug_barrier()  # all threads of this program have read the step
    tl.store(p_step + i_chain, step.to(tl.int64))


def reveal(
    tokens: Tensor,
    drawn: Tensor,
    *,
    score: Tensor | None,
    confidence: Tensor | None = None,
    index: Tensor,
    count: Tensor,
    mask_id: int,
    visible: Tensor | None,
    reveal: Tensor | None,
    sigma: Tensor | None,
    psi: Tensor | None = None,
    hidden: Tensor | None = None,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
) -> None:
    """Do one step more than `step`, the last one that was done: reveal and remask active positions of `tokens`.

    drawn (B, A): a token for each masked slot; where it is -1 the position stays masked. score (B, A) >= 0: lower ones
    are revealed first, NaN last; None for a random order. step: updated in place. psi (B, A): divides sigma among the
    visible positions, and takes the confidence of what is revealed, if that is given; None for one sigma for all.
    hidden: takes the positions that are masked now.
    """
    tables = visible, reveal, sigma
    if not runs_kernel(reveal_kernel, tokens, score) or index.shape[1] > MAX_PROGRAM_SLOTS:
        of_chains = step, iteration, chain_ids, seed
        _reveal(tokens, drawn, score, confidence, index, count, mask_id, tables, psi, hidden, *of_chains)
        return
    batch, slots = index.shape
    if index.numel() == 0:
        step.add_(1)
        return
    contiguous(tokens=tokens, index=index, count=count, step=step, chain_ids=chain_ids, psi=psi, hidden=hidden)
    contiguous(drawn=drawn, score=score, confidence=confidence)
    contiguous(visible=visible, reveal=reveal, sigma=sigma)
    some = visible if visible is not None else reveal
    assert some is not None, "a schedule has one of the tables"
    launch(
        reveal_kernel,
        (batch,),
        tokens,
        index,
        count,
        drawn,
        score,
        confidence,
        psi,
        hidden,
        visible,
        reveal,
        sigma,
        step,
        iteration,
        chain_ids,
        seed,
        mask_id,
        tokens.shape[1],
        slots,
        some.shape[1],
        COUNTS=visible is not None,
        SCORES=score is not None,
        REMASKS=sigma is not None,
        BY_PSI=psi is not None,
        KEEPS_PSI=psi is not None and confidence is not None,
        LISTS=hidden is not None,
        A_BLOCK=power_of_2(slots, MIN_BLOCK),
        num_warps=_num_warps(slots, remasks=sigma is not None),
    )


def bytes_moved(batch: int, slots: int, changed: int) -> int:
    """Return the bytes that must move for `changed` tokens; the tables stay in cache."""
    return 24 * batch * slots + 8 * changed


def _num_warps(slots: int, remasks: bool) -> int:
    """Return the warps of a program: with others some version of Triton keeps numbers on the stack."""
    if slots <= 512:
        return 1 if slots <= 128 else 4
    return 16 if slots <= 2048 or remasks else 32


def _reveal(
    tokens: Tensor,
    drawn: Tensor,
    score: Tensor | None,
    confidence: Tensor | None,
    index: Tensor,
    count: Tensor,
    mask_id: int,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    psi: Tensor | None,
    hidden: Tensor | None,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
) -> None:
    """The torch twin."""
    target, reveal, sigma = tables
    rows, occupied = patch_rows(index, tokens.shape[1]), index >= 0
    present = tokens.view(-1)[rows]
    masked = occupied & (present == mask_id)
    visible, count, step = occupied & ~masked, count.long(), step.add_(1)
    candidates = masked & (drawn >= 0)

    def at_step(table: Tensor) -> Tensor:
        return table[count, step.clamp(max=table.shape[1] - 1)][:, None]

    def keys(stream: int) -> Tensor:
        return step_keys(seed, stream, step[:, None], iteration, chain_ids, index.clamp(min=0))

    remasked = torch.zeros_like(visible)
    if sigma is not None:
        probability = at_step(sigma)
        if psi is not None:
            weights = (-psi).masked_fill(~visible, -torch.inf).softmax(1)
            probability = probability * weights.nan_to_num(0.0)
        remasked = visible & (keys(STREAM_REMASK) < _key_bound(probability))
    if target is not None:
        number = at_step(target) - visible.sum(1, keepdim=True) + remasked.sum(1, keepdim=True)
        # NaN comes after infinity, which becomes the largest number.
        order = keys(STREAM_ORDER) if score is None else score.nan_to_num(nan=torch.inf)
        rank = order.argsort(dim=1, stable=True).argsort(1).masked_fill(~candidates, order.shape[1])
        revealed = candidates & (rank.argsort(dim=1, stable=True).argsort(1) < number)
    else:
        assert reveal is not None, "a schedule has one of the tables"
        revealed = candidates & (keys(STREAM_ORDER) < _key_bound(at_step(reveal)))

    new = torch.where(revealed, drawn, present).masked_fill(remasked, mask_id)
    write_rows(tokens[..., None], rows, new[..., None], occupied)
    if psi is not None and confidence is not None:
        torch.where(revealed, confidence, psi, out=psi)
    if hidden is not None:
        hidden.copy_(torch.where(masked & ~revealed | remasked, index, -1))


def _key_bound(probability: Tensor) -> Tensor:
    return (probability * float(KEYS)).long()
