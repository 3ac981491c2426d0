"""GroupNorm and SiLU of a feature map, after adding an embedding to each cell of the map.

    h'(b, c, y, x) = h(b, c, y, x) + shift(c) + rows(index(b, cell of (y, x)), c)
    out            = SiLU(weight(c) (h' - mean(b, group of c)) / sqrt(variance(b, group of c) + eps) + bias(c))

A cell is a square of pixels, which all add the same row, so the embedding is not expanded to pixels. Shift, rows and
SiLU are optional. h may be two maps, which are concatenated along the channels without a copy.

Shapes: h (B, C, H, W) channels-last, or two such maps of C channels together; shift, weight, bias (C,); rows (R, C);
index (B, rows of cells, columns of cells) int64, with sizes that divide H and W.
Bytes that must move: 2 s B C H W.

A slab is all pixels of a chain in a cache line's channels, in whole groups. One that fits into a program's registers is
read once. A larger one is read by many programs, for its statistics and again for the result. Its result comes right
after the statistics of the next slabs, so that it finds the slab in the device's cache.
Statistics are float32, merged as in Chan, Golub, LeVeque 1983. Source: Wu & He 2018 (GroupNorm).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.group_norm_tiles import (
    channel_factors,
    load_tile,
    moments,
    of_slab,
    slab_statistics,
    store_normalised,
    turn_of,
)
from ipr_fast.kernels.launch import MIN_BLOCK, contiguous, jit, launch, power_of_2, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

LINE = 128  # bytes of a cache line
SECTOR = 32  # bytes that a device reads at least
TILE = 4096  # numbers of a slab that a program has in registers at a time
WHOLE = 16384  # numbers of a slab, at most, that a program reads at once
AHEAD = 4 * 2**20  # bytes of slabs whose statistics are taken before the first result
CACHED = 16 * 2**20  # bytes of a slab, at most, that are still in a device's cache for the result


@jit
def group_norm_kernel(
    p_h,
    p_g,
    p_shift,
    p_rows,
    p_index,
    p_weight,
    p_bias,
    p_out,
    PIXELS,
    C,
    SPLIT,
    WIDTH,
    CELL_H,
    CELL_W,
    ACROSS,
    PER_GROUP,
    eps,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    P_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
):
    """One program for a slab."""
    i_chain, o_channel, m_channel, member = of_slab(tl.program_id(0), C, PER_GROUP, SPAN, C_BLOCK, G_BLOCK)
    o_pixel = tl.arange(0, P_BLOCK)
    h, mask = load_tile(
        p_h,
        p_g,
        p_shift,
        p_rows,
        p_index,
        i_chain,
        0,
        o_pixel,
        o_pixel < PIXELS,
        o_channel,
        m_channel,
        PIXELS,
        C,
        SPLIT,
        WIDTH,
        CELL_H,
        CELL_W,
        ACROSS,
    )
    count = 1.0 * PIXELS * PER_GROUP
    mean, squares = moments(h, mask, member, count)
    factor, summand = channel_factors(p_weight, p_bias, mean, squares / count, eps, member, o_channel, m_channel)
    store_normalised(p_out, h, mask, factor, summand, i_chain, 0, o_pixel, o_channel, PIXELS, C, SILU, "")


@jit
def group_norm_turns_kernel(
    p_h,
    p_g,
    p_shift,
    p_rows,
    p_index,
    p_weight,
    p_bias,
    p_out,
    p_tiles,
    p_factors,
    p_progress,
    PIXELS,
    C,
    SPLIT,
    WIDTH,
    CELL_H,
    CELL_W,
    ACROSS,
    PER_GROUP,
    SLABS,
    TILES,
    LEAD,
    eps,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    P_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):
    """One program for P_BLOCK pixels of a slab, and for either their statistics or their result, in turns.

    p_progress (1 + SLABS), from 0: the programs that have started, and for each slab its tiles that are done, with one
    more once its factors are there. Programs wait for earlier ones alone, by the order in which they have started.
    """
    i_program = tl.atomic_add(p_progress, 1)
    takes, i_slab = turn_of(i_program // TILES, SLABS, LEAD)
    i_tile = i_program % TILES
    p_done = p_progress + 1 + i_slab
    p_factor = p_factors + i_slab.to(tl.int64) * (2 * C_BLOCK) + tl.arange(0, C_BLOCK)
    i_chain, o_channel, m_channel, member = of_slab(i_slab, C, PER_GROUP, SPAN, C_BLOCK, G_BLOCK)
    first = i_tile * P_BLOCK
    o_pixel = tl.arange(0, P_BLOCK)
    h, mask = load_tile(
        p_h,
        p_g,
        p_shift,
        p_rows,
        p_index,
        i_chain,
        first,
        o_pixel,
        o_pixel < PIXELS - first,
        o_channel,
        m_channel,
        PIXELS,
        C,
        SPLIT,
        WIDTH,
        CELL_H,
        CELL_W,
        ACROSS,
    )
    if takes:
        count = 1.0 * tl.minimum(P_BLOCK, PIXELS - first) * PER_GROUP
        mean, squares = moments(h, mask, member, count)
        p_slab = p_tiles + i_slab.to(tl.int64) * TILES * (2 * G_BLOCK)
        p_mean = p_slab + i_tile * (2 * G_BLOCK) + tl.arange(0, G_BLOCK)
        tl.store(p_mean, mean)
        tl.store(p_mean + G_BLOCK, squares)
        tl.debug_barrier()  # all stores come before the count
        if tl.atomic_add(p_done, 1) == TILES - 1:
            mean, variance = slab_statistics(p_slab, PIXELS, PER_GROUP, TILES, P_BLOCK, G_BLOCK, T_BLOCK)
            factor, summand = channel_factors(p_weight, p_bias, mean, variance, eps, member, o_channel, m_channel)
            tl.store(p_factor, factor)
            tl.store(p_factor + C_BLOCK, summand)
            tl.debug_barrier()
            tl.atomic_add(p_done, 1)
    else:
        while tl.atomic_add(p_done, 0) <= TILES:
            pass
        factor = tl.load(p_factor, cache_modifier=".cg")
        summand = tl.load(p_factor + C_BLOCK, cache_modifier=".cg")
        store_normalised(p_out, h, mask, factor, summand, i_chain, first, o_pixel, o_channel, PIXELS, C, SILU, ".cs")


def group_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    other: Tensor | None = None,
    shift: Tensor | None = None,
    rows: Tensor | None = None,
    index: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return a new channels-last map. With `rows`, h may be overwritten.

    other: a second map (B, D, H, W), with the last D channels.
    """
    if not runs_kernel(group_norm_kernel, h, weight, bias, other, shift, rows):
        return _group_norm(h, weight, bias, groups, eps, rows, index, silu, other, shift)
    contiguous(weight=weight, bias=bias, shift=shift)
    h = h.contiguous(memory_format=torch.channels_last)
    other = None if other is None else other.contiguous(memory_format=torch.channels_last)
    shape = (len(h), len(weight), *h.shape[2:])
    out = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    if out.numel():
        rows = None if rows is None else rows.contiguous()
        index = None if index is None else index.contiguous()
        _launch(h, other, shift, rows, index, weight, bias, out, groups, eps, silu)
    return out


def _launch(
    h: Tensor,
    other: Tensor | None,
    shift: Tensor | None,
    rows: Tensor | None,
    index: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    batch, channels, height, width = out.shape
    pixels, per_group, size = height * width, channels // groups, h.element_size()
    down, across = (1, 1) if index is None else index.shape[1:]
    together, whole = slab_groups(pixels, groups, per_group, size)
    slabs, span = batch * -(-groups // together), together * per_group
    c_block, g_block = power_of_2(span, MIN_BLOCK), power_of_2(together, MIN_BLOCK)
    given = (other, shift, rows, index, weight, bias, out)
    sizes = (pixels, channels, h.shape[1], width, height // down, width // across, across, per_group)
    blocks = {"SILU": silu, "SPAN": span, "C_BLOCK": c_block, "G_BLOCK": g_block}
    if whole:
        p_block = power_of_2(pixels, MIN_BLOCK)
        warps = min(16, power_of_2(p_block * c_block // 1024))
        launch(group_norm_kernel, (slabs,), h, *given, *sizes, eps, P_BLOCK=p_block, **blocks, num_warps=warps)
        return
    blocks |= {"P_BLOCK": max(MIN_BLOCK, TILE // c_block), "T_BLOCK": 128}
    tiles = -(-pixels // blocks["P_BLOCK"])
    statistics = torch.empty(slabs, tiles, 2, g_block, dtype=torch.float32, device=h.device)
    factors = torch.empty(slabs, 2, c_block, dtype=torch.float32, device=h.device)
    progress = torch.zeros(1 + slabs, dtype=torch.int32, device=h.device)
    turns = (statistics, factors, progress, *sizes, slabs, tiles, min(slabs, AHEAD // (pixels * span * size)))
    launch(group_norm_turns_kernel, (2 * slabs * tiles,), h, *given, *turns, eps, **blocks, num_warps=4)


def slab_groups(pixels: int, groups: int, per_group: int, size: int) -> tuple[int, bool]:
    """Return the number of groups in a slab, for numbers of `size` bytes, and whether a program reads it at once."""
    of_line = _most_groups(LINE // size, groups, per_group, size)
    fitting = WHOLE // power_of_2(pixels)
    at_once = _most_groups(min(fitting, LINE // size), groups, per_group, size)
    whole = at_once * per_group <= fitting and (at_once == of_line or at_once * per_group * size >= SECTOR)
    return (at_once if whole else of_line), whole


def _most_groups(channels: int, groups: int, per_group: int, size: int) -> int:
    """Return how many groups fit into a number of channels, in whole sectors if possible; at least one."""
    most = max(1, min(groups, channels // per_group))
    return max((n for n in range(1, most + 1) if n * per_group * size % SECTOR == 0), default=most)


def bytes_moved(batch: int, channels: int, height: int, width: int, size: int) -> int:
    """Return the bytes that must move, for numbers of `size` bytes; a slab too large for the cache is read twice."""
    passes = 2 if height * width * LINE <= CACHED else 3
    return passes * size * batch * channels * height * width


def _group_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    rows: Tensor | None = None,
    index: Tensor | None = None,
    silu: bool = True,
    other: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The torch twin."""
    h = h if other is None else torch.cat([h, other], dim=1)
    h = h if shift is None else (h + shift[:, None, None]).to(h.dtype)
    if rows is not None and index is not None:
        cells = F.embedding(index, rows).permute(0, 3, 1, 2)
        batch, channels, down, across = cells.shape
        pixels = h.view(batch, channels, down, h.shape[2] // down, across, h.shape[3] // across)
        pixels.add_(cells[:, :, :, None, :, None])
    out = torch.group_norm(h, groups, weight, bias, eps)
    return F.silu(out, inplace=True) if silu else out
