"""Features of the pixels of a patch, averaged over the patch.

    out(r, k) = mean over pixels s of tanh(sum over c of weight(k, c) z(r, c, s) + bias(k))

Shapes: z (B, n, P), P = C S; weight (K, C), bias (K); out (B, n, K), in the dtype of the weight.
Bytes that must move, for z of s bytes and weights of w bytes a number: B n (s P + w K); the weights stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.launch import MIN_BLOCK, jit, launch, power_of_2, rows_of, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def tanh(x):
    """Return tanh(x), to 4 units of float32 at 1; without overflow."""
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@jit
def pixel_features_kernel(
    p_z,
    p_weight,
    p_bias,
    p_out,
    ROWS,
    C,
    S,
    K,
    Z_STRIDE,
    R_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """One program for R_BLOCK patches and K_BLOCK features."""
    i_row = (tl.program_id(0) * R_BLOCK + tl.arange(0, R_BLOCK)).to(tl.int64)[:, None]
    i_feature = (tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK))[:, None]
    o_channel = tl.arange(0, C_BLOCK)[None, :]
    m_row, m_feature, m_channel = i_row < ROWS, i_feature < K, o_channel < C
    b_weight = tl.load(p_weight + i_feature * C + o_channel, mask=m_feature & m_channel, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + i_feature, mask=m_feature, other=0.0).to(tl.float32)
    total = tl.zeros((R_BLOCK, K_BLOCK), tl.float32)
    for s in range(S):
        b_z = tl.load(p_z + i_row * Z_STRIDE + o_channel * S + s, mask=m_row & m_channel, other=0.0).to(tl.float32)
        x = tl.sum(b_z[:, None, :] * b_weight[None, :, :], axis=2) + tl.trans(b_bias)
        total += tanh(x)
    i_feature = tl.trans(i_feature)
    tl.store(p_out + i_row * K + i_feature, total / S, mask=m_row & (i_feature < K))


def pixel_features(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the features (B, n, K) of patches z (B, n, P)."""
    if not runs_kernel(pixel_features_kernel, z, weight, bias):
        return _pixel_features(z, weight, bias)
    batch, count, numel = z.shape
    features, channels = weight.shape
    out = torch.empty(batch, count, features, dtype=weight.dtype, device=z.device)
    if out.numel() == 0:
        return out
    z, z_stride = rows_of(z)
    c_block, k_block = power_of_2(channels, MIN_BLOCK), min(32, power_of_2(features, MIN_BLOCK))
    r_block = max(MIN_BLOCK, 2048 // (k_block * c_block))
    launch(
        pixel_features_kernel,
        (-(-batch * count // r_block), -(-features // k_block)),
        z,
        weight.contiguous(),
        bias.contiguous(),
        out,
        batch * count,
        channels,
        numel // channels,
        features,
        z_stride,
        R_BLOCK=r_block,
        C_BLOCK=c_block,
        K_BLOCK=k_block,
        num_warps=4,
    )
    return out


def bytes_moved(batch: int, count: int, numel: int, features: int, z_size: int, size: int) -> int:
    """Return the bytes that must move, for patches of `z_size` bytes a number and features of `size` bytes."""
    return batch * count * (z_size * numel + size * features)


def _pixel_features(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The torch twin."""
    pixels = z.to(weight.dtype).unflatten(-1, (weight.shape[1], -1)).transpose(-1, -2)
    return F.linear(pixels, weight, bias).tanh().mean(-2)
