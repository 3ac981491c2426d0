"""A network for the pixels of each patch, with weights of its own.

    hidden(h, s) = tanh(sum over c of U(h, c) (z(c, s) + shift(c)) + b(h))
    out(o, s)    = sum over h of V(o, h) hidden(h, s) + a(o)
    velocity = (z - out[:C]) / max(t, floor),   mix = sigmoid(out[C:])

Shapes: z (B, n, P), P = C S; levels t (B, n); weights (B, n, >= K), each row U (H, C), b (H), shift (C), V (2 C, H),
a (2 C) in this order, K = H C + H + C + 2 C H + 2 C; velocity (B, n, P) float32, mix (B, n, P) in the weights' dtype.
Bytes that must move, for weights of w bytes a number and z of s bytes: B n (w (K + P) + (s + 4) P + 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import MIN_BLOCK, jit, launch, power_of_2, rows_of, runs_kernel
from ipr_fast.kernels.pixel_features import tanh

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def pixel_head_kernel(
    p_weights,
    p_z,
    p_level,
    p_velocity,
    p_mix,
    ROWS,
    S,
    WEIGHTS_STRIDE,
    Z_STRIDE,
    floor,
    C: tl.constexpr,
    H: tl.constexpr,
    R_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    O_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK patches and S_BLOCK pixels of each."""
    i_row = (tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)).to(tl.int64)
    i_pixel = (tl.program_id(1) * S_BLOCK + tl.arange(0, S_BLOCK))[None, None, :]
    i_channel, i_out = tl.arange(0, C_BLOCK)[None, :], tl.arange(0, O_BLOCK)[None, :]
    m_row = i_row < ROWS
    m_channel, m_out = m_row[:, None] & (i_channel < C), m_row[:, None] & (i_out < 2 * C)
    m_pixel = i_pixel < S
    p_row = p_weights + i_row * WEIGHTS_STRIDE
    p_bias, p_shift, p_second, p_last = (
        p_row + H * C,
        p_row + H * C + H,
        p_row + H * C + H + C,
        p_row + 3 * H * C + H + C,
    )
    b_level = tl.load(p_level + i_row, mask=m_row, other=1.0)
    p_patch = p_z + i_row[:, None, None] * Z_STRIDE
    b_z = tl.load(p_patch + i_channel[:, :, None] * S + i_pixel, mask=m_channel[:, :, None] & m_pixel, other=0.0)
    b_shift = tl.load(p_shift[:, None] + i_channel, mask=m_channel, other=0.0)
    x = b_z.to(tl.float32) + b_shift.to(tl.float32)[:, :, None]
    b_last = tl.load(p_last[:, None] + i_out, mask=m_out, other=0.0).to(tl.float32)
    out = b_last[:, :, None] + tl.zeros((R_BLOCK, O_BLOCK, S_BLOCK), tl.float32)
    for h in range(H):
        b_first = tl.load(p_row[:, None] + h * C + i_channel, mask=m_channel, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + h, mask=m_row, other=0.0).to(tl.float32)
        sums = tl.sum(b_first[:, :, None] * x, axis=1) + b_bias[:, None]
        hidden = tanh(sums)
        b_second = tl.load(p_second[:, None] + i_out * H + h, mask=m_out, other=0.0).to(tl.float32)
        out += b_second[:, :, None] * hidden[:, None, :]
    i_out = i_out[:, :, None]
    is_clean, is_mix = m_out[:, :, None] & m_pixel & (i_out < C), m_out[:, :, None] & m_pixel & (i_out >= C)
    b_z = tl.load(p_patch + i_out * S + i_pixel, mask=is_clean, other=0.0).to(tl.float32)
    velocity = (b_z - out) / tl.maximum(b_level, floor)[:, None, None]
    o_out = i_row[:, None, None] * (C * S) + i_pixel
    tl.store(p_velocity + o_out + i_out * S, velocity, mask=is_clean)
    tl.store(p_mix + o_out + (i_out - C) * S, 1 / (1 + tl.exp(-out)), mask=is_mix)


def pixel_head(
    weights: Tensor, z: Tensor, level: Tensor, *, channels: int, hidden: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Return velocity and mix (B, n, P) of patches z (B, n, P) at levels (B, n)."""
    if not runs_kernel(pixel_head_kernel, weights, z, level):
        return _pixel_head(weights, z, level, channels, hidden, floor)
    batch, count, numel = z.shape
    velocity = torch.empty(batch, count, numel, dtype=torch.float32, device=z.device)
    mix = torch.empty(batch, count, numel, dtype=weights.dtype, device=z.device)
    if velocity.numel() == 0:
        return velocity, mix
    (weights, weights_stride), (z, z_stride) = rows_of(weights), rows_of(z)
    pixels = numel // channels
    o_block, s_block = power_of_2(2 * channels, MIN_BLOCK), min(64, power_of_2(pixels, MIN_BLOCK))
    r_block = max(MIN_BLOCK, 1024 // (o_block * s_block))
    launch(
        pixel_head_kernel,
        (-(-batch * count // r_block), -(-pixels // s_block)),
        weights,
        z,
        level.contiguous(),
        velocity,
        mix,
        batch * count,
        pixels,
        weights_stride,
        z_stride,
        floor,
        C=channels,
        H=hidden,
        R_BLOCK=r_block,
        C_BLOCK=power_of_2(channels, MIN_BLOCK),
        O_BLOCK=o_block,
        S_BLOCK=s_block,
        num_warps=4,
    )
    return velocity, mix


def sizes(channels: int, hidden: int) -> tuple[int, ...]:
    """Return how many numbers of a row of weights U, b, shift, V and a have."""
    return hidden * channels, hidden, channels, 2 * channels * hidden, 2 * channels


def bytes_moved(batch: int, count: int, numel: int, channels: int, hidden: int, z_size: int, size: int) -> int:
    """Return the bytes that must move, for patches of `z_size` bytes a number and weights of `size` bytes."""
    return batch * count * (size * (sum(sizes(channels, hidden)) + numel) + (z_size + 4) * numel + 4)


def _pixel_head(
    weights: Tensor, z: Tensor, level: Tensor, channels: int, hidden: int, floor: float
) -> tuple[Tensor, Tensor]:
    """The torch twin."""
    (batch, count, numel), of = z.shape, sizes(channels, hidden)
    first, bias, shift, second, last = weights[..., : sum(of)].flatten(0, 1).split(of, dim=-1)
    x = z.to(weights.dtype).flatten(0, 1).unflatten(1, (channels, -1)) + shift[..., None]
    features = torch.baddbmm(bias[..., None], first.unflatten(1, (hidden, -1)), x).tanh()
    out = torch.baddbmm(last[..., None], second.unflatten(1, (-1, hidden)), features)
    clean, mix = out.view(batch, count, 2, numel).unbind(2)
    return (z - clean) / level.clamp(min=floor)[..., None], mix.sigmoid()
