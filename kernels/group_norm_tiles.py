"""Tiles (pixels, channels) of a feature map for the kernels of group_norm.py: loads, statistics of groups, results.

A slab is all pixels of a chain in SPAN consecutive channels, which are whole groups of PER_GROUP channels. `member`
(G, C) says which channels of a slab belong to each of its groups. Statistics of groups are a count, a mean and the sum
of squared deviations from it.
"""

from __future__ import annotations

from ipr_fast.kernels.launch import jit

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def of_slab(i_slab, C, PER_GROUP, SPAN: tl.constexpr, C_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr):
    """Return a slab's chain, its channels (C), the mask of those that exist, and `member`."""
    blocks = tl.cdiv(C, SPAN)
    o_member = tl.arange(0, C_BLOCK)
    o_channel = i_slab % blocks * SPAN + o_member
    m_channel = (o_member < SPAN) & (o_channel < C)
    member = (o_member // PER_GROUP)[None, :] == tl.arange(0, G_BLOCK)[:, None]
    return (i_slab // blocks).to(tl.int64), o_channel, m_channel, member


@jit
def load_tile(
    p_h,
    p_g,
    p_shift,
    p_rows,
    p_index,
    i_chain,
    first,
    o_pixel,
    m_pixel,
    o_channel,
    m_channel,
    PIXELS,
    C,
    SPLIT,
    WIDTH,
    CELL_H,
    CELL_W,
    ACROSS,
):
    """Return a tile of h' in float32, 0 outside of its mask, and the mask. Its pixels are first + o_pixel."""
    mask = m_pixel[:, None] & m_channel[None, :]
    p_tile = p_h + (i_chain * PIXELS + first) * SPLIT
    m_h = mask & (o_channel < SPLIT)[None, :]
    h = tl.load(p_tile + (o_pixel[:, None] * SPLIT + o_channel[None, :]), mask=m_h, other=0.0).to(tl.float32)
    if p_g is not None:
        p_tile = p_g + (i_chain * PIXELS + first) * (C - SPLIT)
        o_g = o_pixel[:, None] * (C - SPLIT) + (o_channel - SPLIT)[None, :]
        m_g = mask & (o_channel >= SPLIT)[None, :]
        h += tl.load(p_tile + o_g, mask=m_g, other=0.0).to(tl.float32)
    if p_shift is not None:
        shift = tl.load(p_shift + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        h = tl.where(mask, h + shift[None, :], 0.0)
    if p_rows is not None:
        pixel = first + o_pixel
        cell = (pixel // WIDTH // CELL_H) * ACROSS + pixel % WIDTH // CELL_W
        p_cells = p_index + i_chain * (PIXELS // (CELL_H * CELL_W))
        row = tl.load(p_cells + cell, mask=m_pixel, other=0)
        h += tl.load(p_rows + (row[:, None] * C + o_channel[None, :]), mask=mask, other=0.0).to(tl.float32)
    return h, mask


@jit
def moments(h, mask, member, count):
    """Return the mean and the sum of squared deviations (G,) of a tile's groups of `count` numbers."""
    rough = of_groups(h, member) / count
    centred = tl.where(mask, h - to_channels(rough, member)[None, :], 0.0)
    rest = of_groups(centred, member) / count  # the rounding of a sum of large numbers
    return rough + rest, of_groups(centred * centred, member) - count * rest * rest


@jit
def of_groups(tile, member):
    """Return the sum (G,) of each group's numbers in a tile."""
    return tl.sum(tl.where(member, tl.sum(tile, axis=0)[None, :], 0.0), axis=1)


@jit
def merge(count, mean, squares, other_count, other_mean, other_squares):
    """Return the statistics of two sets of numbers together."""
    both = count + other_count
    difference = other_mean - mean
    mean += difference * (other_count / both)
    squares += other_squares + difference * difference * (count * other_count / both)
    return both, mean, squares


@jit
def slab_statistics(p_tiles, PIXELS, PER_GROUP, TILES, P_BLOCK, G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr):
    """Return the mean and the variance (G,) of a slab's groups from its tiles' means and squares (TILES, 2, G)."""
    count = 0.0
    mean = tl.zeros([G_BLOCK], tl.float32)
    squares = tl.zeros([G_BLOCK], tl.float32)
    for i in range(0, TILES, T_BLOCK):
        i_tile = i + tl.arange(0, T_BLOCK)
        o_mean = i_tile[:, None] * (2 * G_BLOCK) + tl.arange(0, G_BLOCK)[None, :]
        m_mean = (o_mean >= 0) & (i_tile < TILES)[:, None]
        means = tl.load(p_tiles + o_mean, mask=m_mean, other=0.0, cache_modifier=".cg")
        within = tl.load(p_tiles + o_mean + G_BLOCK, mask=m_mean, other=0.0, cache_modifier=".cg")
        counts = tl.maximum(tl.minimum(P_BLOCK, PIXELS - i_tile * P_BLOCK), 0).to(tl.float32) * PER_GROUP
        block_count = tl.sum(counts, axis=0)
        block_mean = tl.sum(means * counts[:, None], axis=0) / block_count
        difference = means - block_mean[None, :]
        block_squares = tl.sum(within + difference * difference * counts[:, None], axis=0)
        count, mean, squares = merge(count, mean, squares, block_count, block_mean, block_squares)
    return mean, squares / count


@jit
def turn_of(turn, SLABS, LEAD):
    """Return whether a turn is for a slab's statistics, else for its result, and the slab.

    Statistics of the first LEAD slabs, then of one more slab before each result: S0 S1 R0 S2 R1 R2 for LEAD 1 of 3.
    """
    paired = (turn >= LEAD) & (turn < 2 * SLABS - LEAD)
    is_first = (turn - LEAD) % 2 == 0
    takes = (turn < LEAD) | (paired & is_first)
    of_pair = (turn - LEAD) // 2 + tl.where(is_first, LEAD, 0)
    return takes, tl.where(paired, of_pair, tl.where(turn < LEAD, turn, turn - SLABS))


@jit
def to_channels(of_groups, member):
    """Return each channel's (C,) value of its group (G,); 0 for channels without a group."""
    return tl.sum(tl.where(member, of_groups[:, None], 0.0), axis=0)


@jit
def channel_factors(p_weight, p_bias, mean, variance, eps, member, o_channel, m_channel):
    """Return the factor and the summand (C,) of each channel, which normalise it."""
    deviation = tl.where(m_channel, to_channels(tl.sqrt_rn(variance + eps), member), 1.0)
    factor = tl.load(p_weight + o_channel, mask=m_channel, other=0.0).to(tl.float32) / deviation
    bias = tl.load(p_bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    return factor, bias - to_channels(mean, member) * factor


@jit
def store_normalised(
    p_out,
    h,
    mask,
    factor,
    summand,
    i_chain,
    first,
    o_pixel,
    o_channel,
    PIXELS,
    C,
    SILU: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Write the result of a tile; CACHE: a modifier of the stores."""
    out = h * factor[None, :] + summand[None, :]
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    p_tile = p_out + (i_chain * PIXELS + first) * C
    tl.store(p_tile + (o_pixel[:, None] * C + o_channel[None, :]), out, mask=mask, cache_modifier=CACHE)
