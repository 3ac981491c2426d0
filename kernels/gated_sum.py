"""Gated residual: a layer's output, scaled by a gate for each token, is added to the layer's input.

    out(r, c) = h(r, c) + gate(r, c) x(r, c)

Shapes: h, x (B, n, W); gate (B, n, W) or (1, 1, W), or a table (R, W) with each token's row in `row` (B, n) int64.
Bytes that must move, for numbers of s bytes: 4 s B n W; with a table, which stays in cache, 3 s B n W + 8 B n.
Source: Peebles & Xie 2023 (adaLN-Zero).
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
def gated_sum_kernel(
    p_h,
    p_gate,
    p_x,
    p_row,
    p_out,
    ROWS,
    W,
    H_STRIDE,
    GATE_STRIDE,
    X_STRIDE,
    HAS_TABLE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK tokens."""
    i_row = (tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)).to(tl.int64)
    o_column = tl.arange(0, W_BLOCK)[None, :]
    m_row = i_row < ROWS
    m_block = m_row[:, None] & (o_column < W)
    i_gate = tl.load(p_row + i_row, mask=m_row, other=0) if HAS_TABLE else i_row
    b_h = tl.load(p_h + i_row[:, None] * H_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_gate[:, None] * GATE_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_row[:, None] * X_STRIDE + o_column, mask=m_block, other=0.0).to(tl.float32)
    tl.store(p_out + i_row[:, None] * W + o_column, b_h + b_gate * b_x, mask=m_block)


def gated_sum(h: Tensor, gate: Tensor, x: Tensor, *, row: Tensor | None = None) -> Tensor:
    """Return the sum (B, n, W), in the dtype of h."""
    if not runs_kernel(gated_sum_kernel, h, gate, x):
        return _gated_sum(h, gate, x, row)
    batch, tokens, width = h.shape
    out = torch.empty(batch, tokens, width, dtype=h.dtype, device=h.device)
    if out.numel() == 0:
        return out
    (h, h_stride), (x, x_stride) = rows_of(h), rows_of(x)
    gate, gate_stride = rows_of(gate.expand_as(h)) if row is None else table_of(gate)
    w_block = power_of_2(width)
    r_block = max(1, 2048 // w_block)
    launch(
        gated_sum_kernel,
        (-(-batch * tokens // r_block),),
        h,
        gate,
        x,
        None if row is None else row.contiguous(),
        out,
        batch * tokens,
        width,
        h_stride,
        gate_stride,
        x_stride,
        HAS_TABLE=row is not None,
        R_BLOCK=r_block,
        W_BLOCK=w_block,
        num_warps=4,
    )
    return out


def bytes_moved(batch: int, tokens: int, width: int, size: int, table: bool) -> int:
    """Return the bytes that must move, for numbers of `size` bytes."""
    return batch * tokens * (3 * size * width + 8 if table else 4 * size * width)


def _gated_sum(h: Tensor, gate: Tensor, x: Tensor, row: Tensor | None) -> Tensor:
    """The torch twin."""
    return torch.addcmul(h, gate if row is None else F.embedding(row, gate), x)
