"""GroupNorm and SiLU of a feature map, after adding an embedding to each cell of the map.

    h'(b, c, y, x) = h(b, c, y, x) + rows(index(b, cell of (y, x)), c)
    out            = SiLU(weight(c) (h' - mean(b, group of c)) / sqrt(variance(b, group of c) + eps) + bias(c))

A cell is a square of pixels, which all add the same row, so the embedding is not expanded to pixels. SiLU is optional.

Shapes: h (B, C, H, W) channels-last; rows (R, C); index (B, rows of cells, columns of cells) int64, with sizes that
divide H and W; weight, bias (C,).
Bytes that must move: 3 s B C H W (h is read for the statistics and for the result).
Three launches: each channel's statistics over a share of the pixels; each channel's factor and summand from its group's
statistics; the result. Statistics are float32, merged as in Chan, Golub, LeVeque 1983.
Source: Wu & He 2018 (GroupNorm).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.launch import jit, launch, power_of_2, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def load_with_cells(
    p_h,
    p_rows,
    p_index,
    i_chain,
    o_pixel,
    o_channel,
    PIXELS,
    C,
    WIDTH,
    CELL_H,
    CELL_W,
    DOWN,
    ACROSS,
    CELLS: tl.constexpr,
):
    """Return a tile (pixels, channels) of h' in float32, 0 outside the map, and the mask of the map."""
    mask = (o_pixel < PIXELS)[:, None] & (o_channel < C)[None, :]
    pixel = tl.minimum(o_pixel, PIXELS - 1)
    h = tl.load(p_h + (i_chain * PIXELS + pixel)[:, None] * C + o_channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if CELLS:
        cell = (pixel // WIDTH // CELL_H) * ACROSS + pixel % WIDTH // CELL_W
        row = tl.load(p_index + i_chain * (DOWN * ACROSS) + cell)
        h += tl.load(p_rows + row[:, None] * C + o_channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return h, mask


@jit
def channel_statistics_kernel(
    p_h,
    p_rows,
    p_index,
    p_statistics,
    PIXELS,
    C,
    WIDTH,
    CELL_H,
    CELL_W,
    DOWN,
    ACROSS,
    SHARE,
    CELLS: tl.constexpr,
    P_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    """One program for a share of a chain's pixels and C_BLOCK channels: their means and squared deviations."""
    i_chain, i_share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_channel = tl.program_id(2) * C_BLOCK + tl.arange(0, C_BLOCK)
    first = i_share * SHARE
    last = tl.minimum(first + SHARE, PIXELS)
    count = 0.0
    mean = tl.zeros([C_BLOCK], tl.float32)
    squares = tl.zeros([C_BLOCK], tl.float32)
    for p in range(first, last, P_BLOCK):
        o_pixel = p + tl.arange(0, P_BLOCK)
        h, mask = load_with_cells(
            p_h, p_rows, p_index, i_chain, o_pixel, o_channel, PIXELS, C, WIDTH, CELL_H, CELL_W, DOWN, ACROSS, CELLS
        )
        m_tile = mask & (o_pixel < last)[:, None]
        number = tl.minimum(P_BLOCK, last - p).to(tl.float32)
        tile_mean = tl.sum(tl.where(m_tile, h, 0.0), axis=0) / number
        centred = tl.where(m_tile, h - tile_mean[None, :], 0.0)
        difference = tile_mean - mean
        both = count + number
        mean += difference * (number / both)
        squares += tl.sum(centred * centred, axis=0) + difference * difference * (count * number / both)
        count = both
    o_mean = (i_chain * tl.num_programs(1) + i_share) * 2 * C + o_channel
    tl.store(p_statistics + o_mean, mean, mask=o_channel < C)
    tl.store(p_statistics + o_mean + C, squares, mask=o_channel < C)


@jit
def channel_factors_kernel(
    p_statistics,
    p_weight,
    p_bias,
    p_factors,
    PIXELS,
    C,
    SHARES,
    SHARE,
    GROUPS,
    PER_GROUP,
    eps,
    S_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    """One program for G_BLOCK groups of a chain: the factor and the summand of each of their channels."""
    i_chain = tl.program_id(0).to(tl.int64)
    o_group = tl.program_id(1) * G_BLOCK + tl.arange(0, G_BLOCK)
    o_share, o_member = tl.arange(0, S_BLOCK), tl.arange(0, M_BLOCK)
    channel = o_group[:, None] * PER_GROUP + o_member[None, :]
    m_channel = (o_group < GROUPS)[:, None] & (o_member < PER_GROUP)[None, :]
    mask = (o_share < SHARES)[:, None, None] & m_channel[None, :, :]
    o_mean = (i_chain * SHARES + o_share)[:, None, None] * 2 * C + channel[None, :, :]
    mean = tl.load(p_statistics + o_mean, mask=mask, other=0.0)
    squares = tl.load(p_statistics + o_mean + C, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(SHARE, PIXELS - o_share * SHARE), 0).to(tl.float32)[:, None, None]
    total = PIXELS * PER_GROUP
    group_mean = tl.sum(tl.sum(mean * count, axis=0), axis=1) / total
    difference = tl.where(mask, mean - group_mean[None, :, None], 0.0)
    variance = tl.sum(tl.sum(squares + difference * difference * count, axis=0), axis=1) / total
    deviation = tl.sqrt_rn(variance + eps)
    factor = tl.load(p_weight + channel, mask=m_channel, other=0.0).to(tl.float32) / deviation[:, None]
    summand = tl.load(p_bias + channel, mask=m_channel, other=0.0).to(tl.float32) - group_mean[:, None] * factor
    tl.store(p_factors + i_chain * 2 * C + channel, factor, mask=m_channel)
    tl.store(p_factors + i_chain * 2 * C + C + channel, summand, mask=m_channel)


@jit
def scale_shift_kernel(
    p_h,
    p_rows,
    p_index,
    p_factors,
    p_out,
    PIXELS,
    C,
    WIDTH,
    CELL_H,
    CELL_W,
    DOWN,
    ACROSS,
    CELLS: tl.constexpr,
    SILU: tl.constexpr,
    P_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    """One program for P_BLOCK pixels of a chain and C_BLOCK channels."""
    blocks = tl.cdiv(PIXELS, P_BLOCK)
    i_chain = (tl.program_id(0) // blocks).to(tl.int64)
    o_pixel = tl.program_id(0) % blocks * P_BLOCK + tl.arange(0, P_BLOCK)
    o_channel = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
    h, mask = load_with_cells(
        p_h, p_rows, p_index, i_chain, o_pixel, o_channel, PIXELS, C, WIDTH, CELL_H, CELL_W, DOWN, ACROSS, CELLS
    )
    o_factor = i_chain * 2 * C + o_channel
    factor = tl.load(p_factors + o_factor, mask=o_channel < C, other=0.0)
    summand = tl.load(p_factors + o_factor + C, mask=o_channel < C, other=0.0)
    out = h * factor[None, :] + summand[None, :]
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(p_out + (i_chain * PIXELS + o_pixel)[:, None] * C + o_channel[None, :], out, mask=mask)


def group_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    rows: Tensor | None = None,
    index: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return a new channels-last map. With `rows`, h may be overwritten."""
    if not runs_kernel(scale_shift_kernel, h, weight, bias, rows):
        return _group_norm(h, weight, bias, groups, eps, rows, index, silu)
    h = h.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(h)
    if h.numel() == 0:
        return out
    batch, channels, height, width = h.shape
    pixels = height * width
    down, across = (1, 1) if index is None else index.shape[1:]
    rows = None if rows is None else rows.contiguous()
    index = None if index is None else index.contiguous()
    cells = (pixels, channels, width, height // down, width // across, down, across)
    c_block = min(128, power_of_2(channels))
    blocks = -(-channels // c_block)
    p_block = 4096 // c_block
    shares = min(64, -(-pixels // (8 * p_block)))  # at least eight tiles a program, at most 64 partial results
    share = -(-pixels // shares)
    statistics = torch.empty(batch, shares, 2, channels, dtype=torch.float32, device=h.device)
    factors = torch.empty(batch, 2, channels, dtype=torch.float32, device=h.device)
    tile = {"CELLS": rows is not None, "P_BLOCK": p_block, "C_BLOCK": c_block, "num_warps": 4}
    launch(channel_statistics_kernel, (batch, shares, blocks), h, rows, index, statistics, *cells, share, **tile)
    s_block, m_block = power_of_2(shares), power_of_2(channels // groups)
    g_block = max(1, min(power_of_2(groups), 1024 // (s_block * m_block)))
    launch(
        channel_factors_kernel,
        (batch, -(-groups // g_block)),
        statistics,
        weight,
        bias,
        factors,
        pixels,
        channels,
        shares,
        share,
        groups,
        channels // groups,
        eps,
        S_BLOCK=s_block,
        G_BLOCK=g_block,
        M_BLOCK=m_block,
        num_warps=4,
    )
    grid = (batch * -(-pixels // p_block), blocks)  # pixels in x: y and z end at 65,535
    launch(scale_shift_kernel, grid, h, rows, index, factors, out, *cells, SILU=silu, **tile)
    return out


def bytes_moved(batch: int, channels: int, height: int, width: int, size: int) -> int:
    """Return the bytes that must move, for numbers of `size` bytes."""
    return 3 * size * batch * channels * height * width


def _group_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    rows: Tensor | None,
    index: Tensor | None,
    silu: bool = True,
) -> Tensor:
    """The torch twin."""
    if rows is not None and index is not None:
        cells = F.embedding(index, rows).permute(0, 3, 1, 2)
        batch, channels, down, across = cells.shape
        pixels = h.view(batch, channels, down, h.shape[2] // down, across, h.shape[3] // across)
        pixels.add_(cells[:, :, :, None, :, None])
    out = torch.group_norm(h, groups, weight, bias, eps)
    return F.silu(out, inplace=True) if silu else out
