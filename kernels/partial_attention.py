"""Attention of a chain's A active tokens over the keys and values of all its N tokens.

    out(b, a, h) = sum_n softmax_n(q(b, a, h) . k(b, n, h) / sqrt(D)) v(b, n, h)

The cache already holds the active tokens' own keys and values, at their positions. Queries of padding slots are
computed too; their results are meaningless.

Shapes: q (B, A, W), keys and values (B, N, W), W = heads * D; rows are contiguous. Softmax and sums are float32.
Bytes that must move: s (2 B A W + 2 B N W) for numbers of s bytes; 4 B A N W operations.
Source: Dao 2023, FlashAttention-2 (the online softmax over blocks of keys).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import jit, launch, power_of_2, runs_kernel
from ipr_fast.kernels.scaled_attention import scaled_attention

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

MAX_HEAD_SIZE = 128


@jit
def partial_attention_kernel(
    p_q,
    p_keys,
    p_values,
    p_out,
    A,
    N,
    HEADS,
    Q_CHAIN,
    Q_ROW,
    K_CHAIN,
    K_ROW,
    V_CHAIN,
    V_ROW,
    scale,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """One program for A_BLOCK queries of one head of one chain."""
    i_chain, i_head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    o_query = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    o_dim, m_query = tl.arange(0, D_BLOCK), o_query < A
    m_dim = o_dim < D
    head = i_head * D + o_dim
    q = tl.load(
        p_q + i_chain * Q_CHAIN + o_query[:, None] * Q_ROW + head[None, :],
        mask=m_query[:, None] & m_dim[None, :],
        other=0.0,
    )
    # exp2 of logits / ln 2 saves a multiplication for each.
    to_log2 = scale * 1.4426950408889634
    largest = tl.full([A_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([A_BLOCK], tl.float32)
    out = tl.zeros([A_BLOCK, D_BLOCK], tl.float32)
    for n in range(0, N, N_BLOCK):
        o_key = n + tl.arange(0, N_BLOCK)
        m_key = (o_key < N)[:, None] & m_dim[None, :]
        k = tl.load(p_keys + i_chain * K_CHAIN + o_key[:, None] * K_ROW + head[None, :], mask=m_key, other=0.0)
        v = tl.load(p_values + i_chain * V_CHAIN + o_key[:, None] * V_ROW + head[None, :], mask=m_key, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
        logits = tl.where((o_key < N)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new_largest
    tl.store(
        p_out + (i_chain * A + o_query)[:, None] * (HEADS * D) + head[None, :],
        out / total[:, None],
        mask=m_query[:, None] & m_dim[None, :],
    )


def partial_attention(q: Tensor, keys: Tensor, values: Tensor, *, heads: int) -> Tensor:
    """Return the attention (B, A, W), in the dtype of q."""
    head_size = q.shape[-1] // heads
    if not runs_kernel(partial_attention_kernel, q, keys, values) or head_size > MAX_HEAD_SIZE:
        return _partial_attention(q, keys, values, heads)
    (batch, slots, width), num_tokens = q.shape, keys.shape[1]
    keys, values = keys.to(q.dtype), values.to(q.dtype)  # under autocast the cache has the weights' dtype
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    out = torch.empty(batch, slots, width, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    # Float32 products do not use tensor cores and keep their operands in registers: larger blocks spill.
    max_queries, max_keys = (16, 32) if q.dtype == torch.float32 else (64, 64)
    if head_size > 64:
        max_keys //= 2
    a_block, n_block = min(max_queries, power_of_2(slots, 16)), min(max_keys, power_of_2(num_tokens, 16))
    d_block = power_of_2(head_size, 16)
    launch(
        partial_attention_kernel,
        (batch * heads, -(-slots // a_block)),
        q,
        keys,
        values,
        out,
        slots,
        num_tokens,
        heads,
        *q.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        head_size**-0.5,
        D=head_size,
        D_BLOCK=d_block,
        A_BLOCK=a_block,
        N_BLOCK=n_block,
        num_warps=1 if a_block * max(n_block, d_block) <= 256 else 4,  # 16 x 16 tiles: 8 numbers a thread
        num_stages=2,
    )
    return out


def bytes_moved(batch: int, slots: int, tokens: int, width: int, size: int) -> int:
    """Return the bytes that must move, for numbers of `size` bytes."""
    return size * batch * (2 * slots + 2 * tokens) * width


def _partial_attention(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """The torch twin."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, keys, values))
    return scaled_attention(q, k, v).transpose(1, 2).flatten(2)
