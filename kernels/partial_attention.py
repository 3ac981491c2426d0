"""Attention of a chain's A active tokens over all its N tokens, and of all tokens over those of its context.

    out(b, a, h) = sum_n softmax_n(q(b, a, h) . k(b, n, h) / sqrt(D)) v(b, n, h)

    k(b, n), v(b, n) = own(b, slot(b, n))    for active tokens; none for the context's attention
                       cache(b N + n)        for context tokens, whose slot is -1

The cache's rows of active tokens are never read, and may be overwritten. Queries of padding slots are computed too;
their results are meaningless, as are those of active tokens in the context's attention.

Shapes: q (B, A, W), W = heads * D, of the context (B, N, W); own (B, A, 2 W) and cache (B N + 1, 2 W) or longer, keys
beside values; slot (B, N + 1) int32 and place (B, A) int64 as in `context_mask` and `slot_inputs`; bias (B, 1, 1, N) of
`context_mask`. Softmax and sums are float32.
Bytes that must move: s (2 B A W + 2 B N W) + 4 B N for numbers of s bytes; 4 B A N W operations.

Two kernels. Tiles multiply 16 queries or more at a time on tensor cores; up to four queries fill them with those of
four heads. In float32 each number is the sum of two that TF32 holds, and each product is three (`tf32x3`): as accurate
as products in float32, with a quarter of the accesses to shared memory. Few queries in float32 take rows instead: four
numbers of a query a thread, without shared memory. README.md has what the compiler reports.
Source: Dao 2023, FlashAttention-2 (the online softmax over blocks of keys); Ootomo and Yokota 2022 (sums of TF32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipr_fast.kernels.launch import jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.scaled_attention import scaled_attention

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

MAX_HEAD_SIZE = 128
MAX_ROW_QUERIES = 6  # with more, tiles take fewer instructions


@jit
def partial_attention_kernel(
    p_q,
    p_own,
    p_cache,
    p_slot,
    p_out,
    A,
    N,
    HEADS,
    Q_CHAIN,
    Q_ROW,
    OWN_CHAIN,
    OWN_ROW,
    CACHE_ROW,
    scale,
    CONTEXT: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    H_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    """One program for A_BLOCK queries of H_BLOCK heads of one chain.

    Each row of the tile is a query of one head, and 0 in the columns of other heads.
    """
    W, blocks = HEADS * D, tl.cdiv(HEADS, H_BLOCK)
    i_chain, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_row, o_column = tl.arange(0, H_BLOCK * A_BLOCK), tl.arange(0, C_BLOCK)
    o_query, column = tl.program_id(1) * A_BLOCK + o_row % A_BLOCK, i_block * H_BLOCK * D + o_column
    m_column = (o_column < H_BLOCK * D) & (column < W)
    m_query = (o_query < A)[:, None] & m_column[None, :]
    if H_BLOCK > 1:
        m_query = m_query & ((o_row // A_BLOCK)[:, None] == (o_column // D)[None, :])
    p_own += i_chain * OWN_CHAIN
    p_cache += i_chain * N * CACHE_ROW
    o_q = i_chain * Q_CHAIN + o_query[:, None] * Q_ROW + column[None, :]
    q = tl.load(p_q + o_q, mask=m_query, other=0.0)
    # exp2 of logits / ln 2 saves a multiplication for each.
    to_log2 = scale * 1.4426950408889634
    largest = tl.full([H_BLOCK * A_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([H_BLOCK * A_BLOCK], tl.float32)
    out = tl.zeros([H_BLOCK * A_BLOCK, C_BLOCK], tl.float32)
    for n in range(0, N, N_BLOCK):
        o_key = n + tl.arange(0, N_BLOCK)
        slot = tl.load(p_slot + i_chain * (N + 1) + o_key, mask=o_key < N, other=-1)
        m_context = (slot < 0) & (o_key < N)
        m_cached = m_context[:, None] & m_column[None, :]
        o_cached = (o_key * CACHE_ROW)[:, None] + column[None, :]
        k = tl.load(p_cache + o_cached, mask=m_cached, other=0.0).to(q.dtype)
        v = tl.load(p_cache + W + o_cached, mask=m_cached, other=0.0).to(q.dtype)
        if not CONTEXT:
            m_own, o_own = (slot >= 0)[:, None] & m_column[None, :], (slot * OWN_ROW)[:, None] + column[None, :]
            k = tl.load(p_own + o_own, mask=m_own, other=k)
            v = tl.load(p_own + W + o_own, mask=m_own, other=v)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_log2
        if CONTEXT:
            logits = tl.where(m_context[None, :], logits, -1.0e30)
        logits = tl.where((o_key < N)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    o_out = (i_chain * A + o_query)[:, None] * W + column[None, :]
    tl.store(p_out + o_out, out / total[:, None], mask=m_query)


@jit
def key_and_value(p_own, p_cache, p_slot, n, m_column, OWN_ROW, CACHE_ROW, W, MASKED: tl.constexpr):
    """Load key and value n of each row's chain and head."""
    slot = tl.load(p_slot + n)[:, None]
    p_key = tl.where(slot >= 0, p_own + slot * OWN_ROW, p_cache + n * CACHE_ROW)
    if MASKED:
        k = tl.load(p_key, mask=m_column, other=0.0)
        v = tl.load(p_key + W, mask=m_column, other=0.0)
    else:
        k = tl.load(p_key)
        v = tl.load(p_key + W)
    return k, v


@jit
def partial_attention_rows_kernel(
    p_q,
    p_own,
    p_cache,
    p_slot,
    p_out,
    ROWS,
    A,
    N,
    HEADS,
    Q_CHAIN,
    Q_ROW,
    OWN_CHAIN,
    OWN_ROW,
    CACHE_ROW,
    scale,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK queries, ordered by chain and head; four keys at a time."""
    o_row = tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)
    o_column = tl.arange(0, D_BLOCK)[None, :]
    m_out = (o_row < ROWS)[:, None] & (o_column < D)
    i_row = tl.minimum(o_row, ROWS - 1)
    m_column = (i_row >= 0)[:, None] & (o_column < D)
    W, i_query = HEADS * D, (i_row % A)[:, None]
    i_chain = (i_row // A // HEADS).to(tl.int64)[:, None]
    column = (i_row // A % HEADS)[:, None] * D + o_column
    p_own += i_chain * OWN_CHAIN + column
    p_cache += i_chain * N * CACHE_ROW + column
    p_slot += (i_row // A // HEADS).to(tl.int64) * (N + 1)
    q = tl.load(p_q + i_chain * Q_CHAIN + i_query * Q_ROW + column, mask=m_column, other=0.0)
    q *= scale * 1.4426950408889634
    largest = tl.full([R_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([R_BLOCK], tl.float32)
    out = tl.zeros([R_BLOCK, D_BLOCK], tl.float32)
    for n in range(0, N, 4):
        n1, n2, n3 = tl.minimum(n + 1, N - 1), tl.minimum(n + 2, N - 1), tl.minimum(n + 3, N - 1)
        k0, v0 = key_and_value(p_own, p_cache, p_slot, n, m_column, OWN_ROW, CACHE_ROW, W, D < D_BLOCK)
        k1, v1 = key_and_value(p_own, p_cache, p_slot, n1, m_column, OWN_ROW, CACHE_ROW, W, D < D_BLOCK)
        k2, v2 = key_and_value(p_own, p_cache, p_slot, n2, m_column, OWN_ROW, CACHE_ROW, W, D < D_BLOCK)
        k3, v3 = key_and_value(p_own, p_cache, p_slot, n3, m_column, OWN_ROW, CACHE_ROW, W, D < D_BLOCK)
        logit0 = tl.sum(q * k0, axis=1)
        logit1 = tl.where(n + 1 < N, tl.sum(q * k1, axis=1), float("-inf"))
        logit2 = tl.where(n + 2 < N, tl.sum(q * k2, axis=1), float("-inf"))
        logit3 = tl.where(n + 3 < N, tl.sum(q * k3, axis=1), float("-inf"))
        new_largest = tl.maximum(tl.maximum(logit0, logit1), tl.maximum(logit2, logit3))
        new_largest = tl.maximum(largest, new_largest)
        shrink = tl.exp2(largest - new_largest)
        weight0, weight1 = tl.exp2(logit0 - new_largest), tl.exp2(logit1 - new_largest)
        weight2, weight3 = tl.exp2(logit2 - new_largest), tl.exp2(logit3 - new_largest)
        total = total * shrink + (weight0 + weight1 + weight2 + weight3)
        out = out * shrink[:, None] + weight0[:, None] * v0 + weight1[:, None] * v1
        out += weight2[:, None] * v2 + weight3[:, None] * v3
        largest = new_largest
    tl.store(p_out + (i_chain * A + i_query) * W + column, out / total[:, None], mask=m_out)


def partial_attention(q: Tensor, own: Tensor, cache: Tensor, slot: Tensor, place: Tensor, *, heads: int) -> Tensor:
    """Return the attention (B, A, W) of active tokens, in the dtype of q."""
    if not _runs(q, heads, own, cache):
        return _partial_attention(q, own, cache, slot, place, heads)
    return _launch(q, own, cache, slot, heads)


def context_attention(
    q: Tensor, keys_values: Tensor, cache: Tensor, slot: Tensor, bias: Tensor, *, heads: int
) -> Tensor:
    """Return the attention (B, N, W) among context tokens, whose keys_values (B, N, 2 W) the cache holds too."""
    if not _runs(q, heads, keys_values, cache):
        return _context_attention(q, keys_values, bias, heads)
    return _launch(q, None, cache, slot, heads)


def _runs(q: Tensor, heads: int, *keys_values: Tensor) -> bool:
    return q.shape[-1] // heads <= MAX_HEAD_SIZE and runs_kernel(partial_attention_kernel, q, *keys_values)


def _launch(q: Tensor, own: Tensor | None, cache: Tensor, slot: Tensor, heads: int) -> Tensor:
    (batch, slots, width), num_tokens, head_size = q.shape, slot.shape[1] - 1, q.shape[-1] // heads
    keys = cache if own is None else own
    for name, tensor in (("q", q), ("cache", cache), ("own", keys), ("slot", slot)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    out = torch.empty(batch, slots, width, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    given = (q, keys, cache, slot.contiguous(), out)
    strides = (*q.stride()[:2], keys.stride(0), keys.stride(-2), cache.stride(0))
    sizes = (slots, num_tokens, heads, *strides, head_size**-0.5)
    if q.dtype == keys.dtype == cache.dtype == torch.float32 and slots <= MAX_ROW_QUERIES and own is not None:
        d_block = power_of_2(head_size, 4)
        r_block, rows = 512 // d_block, batch * heads * slots
        launch(
            partial_attention_rows_kernel,
            (-(-rows // r_block),),
            *given,
            rows,
            *sizes,
            D=head_size,
            D_BLOCK=d_block,
            R_BLOCK=r_block,
            num_warps=4,
        )
        return out
    options: dict[str, Any] = _tile(head_size, slots, num_tokens, q.dtype)
    grid = batch * -(-heads // options["H_BLOCK"]), -(-slots // options["A_BLOCK"])
    launch(partial_attention_kernel, grid, *given, *sizes, CONTEXT=own is None, **options)
    return out


def _tile(head_size: int, slots: int, num_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the sizes of a tile and the warps of a program: of an H100's fastest, without spills."""
    half = dtype != torch.float32
    heads = 4 if half and slots <= 4 and head_size <= 16 else 1
    columns = power_of_2(heads * head_size, 16)
    rows, keys = _fitting(slots), _fitting(num_tokens)
    if columns > 64:
        rows, keys, warps = min(rows, 64 if half else 16), min(keys, 32 if half else 16), 4
    elif half:
        warps = 4 if rows == 64 else 1 if columns == 64 or rows == keys == 16 else 2
    else:
        keys = min(keys, rows, 32)
        warps = max(1, min(4, rows * columns // 512))
    return {
        "D": head_size,
        "PRECISION": "ieee" if half or columns > 64 or torch.version.hip else "tf32x3",
        "H_BLOCK": heads,
        "A_BLOCK": rows // heads,
        "N_BLOCK": keys,
        "C_BLOCK": columns,
        "num_warps": warps,
        "num_stages": 1,  # loads that depend on a slot are not pipelined
    }


def _fitting(number: int) -> int:
    """Return the largest block, of 16, 32 or 64, with as few idle places as blocks of 32."""
    if number <= 16:
        return 16
    return 64 if -(-number // 64) * 2 == -(-number // 32) else 32


def bytes_moved(batch: int, slots: int, tokens: int, width: int, size: int) -> int:
    """Return the bytes that must move, for numbers of `size` bytes."""
    return batch * (size * (2 * slots + 2 * tokens) * width + 4 * tokens)


def _partial_attention(q: Tensor, own: Tensor, cache: Tensor, slot: Tensor, place: Tensor, heads: int) -> Tensor:
    """The torch twin, which completes the cache."""
    batch, num_tokens = slot.shape[0], slot.shape[1] - 1
    cache.index_copy_(0, place.flatten(), own.flatten(0, 1).to(cache.dtype))  # autocast may have lowered them
    return _context_attention(q, cache[: batch * num_tokens].view(batch, num_tokens, -1).to(q.dtype), None, heads)


def _context_attention(q: Tensor, keys_values: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The torch twin; without a bias, of all keys."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, *keys_values.chunk(2, dim=-1)))
    return scaled_attention(q, k, v, bias).transpose(1, 2).flatten(2)
