"""A sum into the residual stream of tokens, and the modulated LayerNorm of the sum, in one pass.

    gated_norm:     sum(r, c) = h(r, c) + gate(r, c) x(r, c)
    embedded_norm:  sum(r, c) = embedding(index(r), c) + x(r, c)
    both:           out(r, c) = (sum(r, c) - mean(r)) / sqrt(variance(r) + eps) (1 + scale(r, c)) + shift(r, c)

Shapes: h, x (B, n, W); gate, scale, shift (B, n, W) or (1, 1, W), or tables (R, W) with each token's row in `row`
(B, n) int64. All may be slices of wider tensors. embedding (N, W); index (B, n) int32, where padding, -1, takes row 0.
Bytes that must move, for numbers of s bytes: 7 s B n W; with tables, which stay in cache, 4 s B n W + 8 B n; with an
embedding too, 3 s B n W + 12 B n.
Source: Peebles & Xie 2023 (adaLN-Zero); Ba, Kiros, Hinton 2016 (LayerNorm).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.launch import jit, launch, power_of_2, rows_of, runs_kernel, table_of
from ipr_fast.kernels.modulated_norm import _modulated_layer_norm

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def residual_norm_kernel(
    p_x,
    p_h,
    p_index,
    p_gate,
    p_scale,
    p_shift,
    p_row,
    p_sum,
    p_out,
    ROWS,
    W,
    X_STRIDE,
    H_STRIDE,
    GATE_STRIDE,
    SCALE_STRIDE,
    SHIFT_STRIDE,
    eps,
    EMBEDS: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK tokens. EMBEDS: h is an embedding, and there is no gate."""
    i_row = (tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)).to(tl.int64)
    o_column = tl.arange(0, W_BLOCK)[None, :]
    m_row = i_row < ROWS
    m_block = m_row[:, None] & (o_column < W)
    i_table = (tl.load(p_row + i_row, mask=m_row, other=0) if HAS_TABLES else i_row)[:, None]
    i_h = tl.maximum(tl.load(p_index + i_row, mask=m_row, other=0), 0).to(tl.int64) if EMBEDS else i_row
    i_row = i_row[:, None]
    b_h = tl.load(p_h + i_h[:, None] * H_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_row * X_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    if not EMBEDS:
        b_x *= tl.load(p_gate + i_table * GATE_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_h += b_x
    tl.store(p_sum + i_row * W + o_column, b_h, mask=m_block)

    centred = tl.where(m_block, b_h - (tl.sum(b_h, axis=1) / W)[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / W + eps)
    b_scale = tl.load(p_scale + i_table * SCALE_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_table * SHIFT_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    out = centred / deviation[:, None] * (1.0 + b_scale) + b_shift
    tl.store(p_out + i_row * W + o_column, out, mask=m_block)


def gated_norm(
    h: Tensor, gate: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm, (B, n, W) in the dtype of h."""
    if not runs_kernel(residual_norm_kernel, h, gate, x, scale, shift):
        return _gated_norm(h, gate, x, scale, shift, eps, row)
    return _launch(h, None, gate, x, scale, shift, eps, row, h.dtype)


def embedded_norm(
    embedding: Tensor,
    index: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm, (B, n, W) in the wider dtype of x and the embedding."""
    if not runs_kernel(residual_norm_kernel, x, embedding, scale, shift):
        return _embedded_norm(embedding, index, x, scale, shift, eps, row)
    dtype = torch.promote_types(x.dtype, embedding.dtype)
    return _launch(embedding, index.contiguous(), None, x, scale, shift, eps, row, dtype)


def _launch(
    h: Tensor,
    index: Tensor | None,
    gate: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    row: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; with an index, h is the embedding."""
    batch, tokens, width = x.shape
    total, out = (torch.empty(batch, tokens, width, dtype=dtype, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return total, out
    h, h_stride = rows_of(h) if index is None else table_of(h)
    of_gate, gate_stride = (None, 0) if gate is None else _modulation(gate, x, row)
    (scale, scale_stride), (shift, shift_stride) = (_modulation(each, x, row) for each in (scale, shift))
    x, x_stride = rows_of(x)
    w_block = power_of_2(width)
    r_block = max(1, 1024 // w_block)
    launch(
        residual_norm_kernel,
        (-(-batch * tokens // r_block),),
        x,
        h,
        index,
        of_gate,
        scale,
        shift,
        None if row is None else row.contiguous(),
        total,
        out,
        batch * tokens,
        width,
        x_stride,
        h_stride,
        gate_stride,
        scale_stride,
        shift_stride,
        eps,
        EMBEDS=index is not None,
        HAS_TABLES=row is not None,
        R_BLOCK=r_block,
        W_BLOCK=w_block,
        num_warps=4,
    )
    return total, out


def _modulation(tensor: Tensor, tokens: Tensor, row: Tensor | None) -> tuple[Tensor, int]:
    """Return rows for all tokens, or a table if they have a `row` of it, and their stride."""
    return rows_of(tensor.expand_as(tokens)) if row is None else table_of(tensor)


def bytes_moved(batch: int, tokens: int, width: int, size: int, table: bool, embeds: bool = False) -> int:
    """Return the bytes that must move, for numbers of `size` bytes; an embedding stays in cache."""
    numbers = (3 if embeds else 4 if table else 5) + (0 if table else 2)
    return batch * tokens * (numbers * size * width + 8 * table + 4 * embeds)


def _gated_norm(
    h: Tensor, gate: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The torch twin."""
    total = torch.addcmul(h, gate if row is None else F.embedding(row, gate), x)
    return total, _modulated_layer_norm(total, scale, shift, eps, row)


def _embedded_norm(
    embedding: Tensor, index: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The torch twin."""
    total = x + F.embedding(index.clamp(min=0), embedding)
    return total, _modulated_layer_norm(total, scale, shift, eps, row)
