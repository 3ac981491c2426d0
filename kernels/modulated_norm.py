"""LayerNorm of tokens, with a scale and a shift for each token (adaLN).

    out(r, c) = (h(r, c) - mean(r)) / sqrt(variance(r) + eps) (1 + scale(r, c)) + shift(r, c)

Shapes: h (B, n, W); scale, shift (B, n, W) or (1, 1, W), or tables (R, W) with each token's row in `row` (B, n) int64.
All may be slices of wider tensors.
Bytes that must move, for numbers of s bytes: 4 s B n W; with tables, which stay in cache, 2 s B n W + 8 B n.
Source: Ba, Kiros, Hinton 2016 (LayerNorm); Peebles & Xie 2023 (the modulation).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.launch import jit, launch, power_of_2, rows_of, runs_kernel, table_of

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def layer_norm_kernel(
    p_h,
    p_scale,
    p_shift,
    p_row,
    p_out,
    ROWS,
    W,
    H_STRIDE,
    SCALE_STRIDE,
    SHIFT_STRIDE,
    eps,
    HAS_TABLES: tl.constexpr,
    R_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK tokens."""
    i_row = (tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)).to(tl.int64)
    o_column = tl.arange(0, W_BLOCK)[None, :]
    m_row = i_row < ROWS
    m_block = m_row[:, None] & (o_column < W)
    i_table = (tl.load(p_row + i_row, mask=m_row, other=0) if HAS_TABLES else i_row)[:, None]
    i_row = i_row[:, None]
    b_h = tl.load(p_h + i_row * H_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    centred = tl.where(m_block, b_h - (tl.sum(b_h, axis=1) / W)[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, axis=1) / W + eps)
    b_scale = tl.load(p_scale + i_table * SCALE_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_table * SHIFT_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    out = centred / deviation[:, None] * (1.0 + b_scale) + b_shift
    tl.store(p_out + i_row * W + o_column, out, mask=m_block)


def modulated_layer_norm(h: Tensor, scale: Tensor, shift: Tensor, *, eps: float, row: Tensor | None = None) -> Tensor:
    """Return the modulated norm (B, n, W) of tokens h, in their dtype."""
    if not runs_kernel(layer_norm_kernel, h, scale, shift):
        return _modulated_layer_norm(h, scale, shift, eps, row)
    batch, tokens, width = h.shape
    out = torch.empty(batch, tokens, width, dtype=h.dtype, device=h.device)
    if out.numel() == 0:
        return out
    h, h_stride = rows_of(h)
    scale, scale_stride = rows_of(scale.expand_as(h)) if row is None else table_of(scale)
    shift, shift_stride = rows_of(shift.expand_as(h)) if row is None else table_of(shift)
    w_block = power_of_2(width)
    r_block = max(1, 1024 // w_block)
    launch(
        layer_norm_kernel,
        (-(-batch * tokens // r_block),),
        h,
        scale,
        shift,
        None if row is None else row.contiguous(),
        out,
        batch * tokens,
        width,
        h_stride,
        scale_stride,
        shift_stride,
        eps,
        HAS_TABLES=row is not None,
        R_BLOCK=r_block,
        W_BLOCK=w_block,
        num_warps=4,
    )
    return out


def bytes_moved(batch: int, tokens: int, width: int, size: int, table: bool = False) -> int:
    """Return the bytes that must move, for numbers of `size` bytes."""
    return batch * tokens * (2 * size * width + 8 if table else 4 * size * width)


def _modulated_layer_norm(h: Tensor, scale: Tensor, shift: Tensor, eps: float, row: Tensor | None = None) -> Tensor:
    """The torch twin."""
    factor = 1 + scale
    if row is not None:
        factor, shift = F.embedding(row, factor), F.embedding(row, shift)
    one = h.new_ones(h.shape[-1])  # on a CPU layer_norm is twice as fast with a weight
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], one, eps=eps), factor)
