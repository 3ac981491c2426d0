"""Accept or reject the proposals of an iteration: Metropolis' rule for every chain, and the copies that follow from it.

    u = (52 bits of Philox words 0 and 1 + 1/2) 2^-52, in (0, 1)
    accepted = r' >= r  or  T log u < r' - r,      in float64
    kept = x', r = r' where accepted; x' = kept elsewhere

So a proposal is accepted with probability min(1, exp((r' - r) / T)); T = 0 is greedy and takes equals. A reward of
-infinity loses to any other; NaN is never accepted. With `best`, the sample of the highest reward seen is kept as well;
of equals the first.

Shapes: values, kept, best (B, ...) of one dtype of 4 or 8 bytes; reward, kept_reward, best_reward (B,) float64;
accepted, improved (B,) bool; chain_ids (B,) int64; temperature () float64; iteration, seed () int64.
Bytes that must move: 2 for each byte of a chain's values, from the one copy to the other.
Source: Metropolis et al. 1953.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.launch import contiguous, jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.philox import STREAM_ACCEPT, philox_4x32, words_4

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


class Kept(NamedTuple):
    """Samples (B, ...) and their rewards (B,) float64."""

    values: Tensor
    reward: Tensor


@jit
def log_uniform(chain_id, iteration, seed):
    """The logarithm of a chain's uniform number, float64."""
    c0 = chain_id * 0 + 8 << 28  # STREAM_ACCEPT
    w0, w1, _, _ = words_4(c0, chain_id * 0, iteration + chain_id * 0, chain_id, seed)
    bits = ((w0 >> 6).to(tl.int64) << 26) | (w1 >> 6).to(tl.int64)
    return tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16)


@jit
def accept_kernel(
    p_values,
    p_kept,
    p_best,
    p_reward,
    p_kept_reward,
    p_best_reward,
    p_accepted,
    p_improved,
    p_chain_ids,
    p_temperature,
    p_iteration,
    p_seed,
    NUMEL,
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chain; values are words of four bytes."""
    i_chain = tl.program_id(0).to(tl.int64)
    proposed, kept = tl.load(p_reward + i_chain), tl.load(p_kept_reward + i_chain)
    best = tl.load(p_best_reward + i_chain) if BEST else kept
    log_u = log_uniform(tl.load(p_chain_ids + i_chain), tl.load(p_iteration), tl.load(p_seed))
    accepted = (proposed >= kept) | (tl.load(p_temperature) * log_u < proposed - kept)
    tl.debug_barrier()  # all threads of this program have read the rewards
    tl.store(p_accepted + i_chain, accepted.to(tl.int8))
    tl.store(p_kept_reward + i_chain, tl.where(accepted, proposed, kept))
    improved = accepted
    if BEST:
        improved = accepted & (proposed > best)
        tl.store(p_improved + i_chain, improved.to(tl.int8))
        tl.store(p_best_reward + i_chain, tl.where(improved, proposed, best))
    for start in range(0, NUMEL, BLOCK):
        o_word = start + tl.arange(0, BLOCK)
        o_place = i_chain * NUMEL + o_word
        m_new, m_old = o_word < tl.where(accepted, NUMEL, 0), o_word < tl.where(accepted, 0, NUMEL)
        b_new = tl.load(p_values + o_place, mask=m_new, other=0)
        tl.store(p_kept + o_place, b_new, mask=m_new)
        tl.store(p_values + o_place, tl.load(p_kept + o_place, mask=m_old, other=0), mask=m_old)
        if BEST:
            tl.store(p_best + o_place, b_new, mask=o_word < tl.where(improved, NUMEL, 0))


def accept(
    values: Tensor,
    reward: Tensor,
    *,
    kept: Kept,
    accepted: Tensor,
    temperature: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
    best: Kept | None = None,
    improved: Tensor | None = None,
    log_u: Tensor | None = None,
) -> None:
    """Accept or reject the proposals `values`, which have these rewards: afterwards `values` and `kept` are equal.

    Writes `values`, `kept`, `accepted` and, where given, `best` and `improved`: the chains whose best sample is new.
    log_u: the chains' `log_uniforms`, for a CPU where they are there already; the kernel makes its own.
    """
    if (best is None) != (improved is None):
        raise ValueError("best and improved must be given together")
    if values.element_size() not in (4, 8):
        raise ValueError(f"values must have a dtype of 4 or 8 bytes, got {values.dtype}")
    words = values.view(torch.int32)
    if not runs_kernel(accept_kernel, words):
        _accept(values, reward, kept, accepted, temperature, iteration, chain_ids, seed, best, improved, log_u)
        return
    if not len(values):
        return
    contiguous(values=values, reward=reward, kept=kept.values, kept_reward=kept.reward, chain_ids=chain_ids)
    contiguous(accepted=accepted)
    if best is not None:
        contiguous(best=best.values, best_reward=best.reward, improved=improved)
    numel = words.numel() // len(values)
    launch(
        accept_kernel,
        (len(values),),
        words,
        kept.values.view(torch.int32),
        None if best is None else best.values.view(torch.int32),
        reward,
        kept.reward,
        None if best is None else best.reward,
        accepted.view(torch.int8),
        None if improved is None else improved.view(torch.int8),
        chain_ids,
        temperature,
        iteration,
        seed,
        numel,
        BEST=best is not None,
        BLOCK=min(power_of_2(numel, 32), 1024),
        num_warps=4 if numel > 256 else 1,
    )


def _accept(
    values: Tensor,
    reward: Tensor,
    kept: Kept,
    accepted: Tensor,
    temperature: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
    best: Kept | None = None,
    improved: Tensor | None = None,
    log_u: Tensor | None = None,
) -> None:
    """The twin of `accept_kernel`."""
    log_u = log_uniforms(seed, iteration, chain_ids) if log_u is None else log_u
    torch.logical_or(reward >= kept.reward, temperature * log_u < reward - kept.reward, out=accepted)
    _copy(accepted, values, reward, kept)
    values.copy_(kept.values)
    if best is not None:
        assert improved is not None, "given with best"
        torch.logical_and(accepted, reward > best.reward, out=improved)
        _copy(improved, values, reward, best)


def log_uniforms(seed: Tensor | int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
    """Return the logarithms (B,) float64 of the uniform numbers of chains (B,), or (K, B) of iterations (K, 1)."""
    stream = torch.full_like(chain_ids, STREAM_ACCEPT << 28)
    w0, w1, _, _ = philox_4x32(stream, torch.zeros_like(chain_ids), iteration, chain_ids, seed)
    return ((((w0 >> 6) << 26) | (w1 >> 6)).double() + 0.5).mul_(2.0**-52).log_()


def _copy(chains: Tensor, values: Tensor, reward: Tensor, into: Kept) -> None:
    """Copy these chains (B,) bool of the proposals."""
    rows = chains.view(-1, *(1,) * (values.ndim - 1))
    torch.where(rows, values, into.values, out=into.values)
    torch.where(chains, reward, into.reward, out=into.reward)


def bytes_moved(batch: int, numel: int, size: int) -> int:
    """Return the bytes that must move for chains of `numel` values of `size` bytes each."""
    return 2 * batch * numel * size
