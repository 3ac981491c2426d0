"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011) and Box-Muller normals.

    key     = the 64-bit seed
    counter = (stream << 28 | quad, step << 16 | patch, iteration, chain id)

`quad` is element // 4 within the patch: one counter gives four 32-bit words, and those give four normals. So a number
depends on the seed and on what it is for, never on the batch, slot, device or order in which it is drawn.

The conversions are Triton's: a word w, read as a signed int32, gives u = (w if w >= 0 else -w - 1) * 4.6566127342e-10
in [0, 1); two uniforms give sqrt(-2 ln max(u1, 1e-7)) * (cos, sin)(2 pi u2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STREAM_INITIAL, STREAM_RENOISE, STREAM_POSTERIOR, STREAM_CHOICE, STREAM_SWAP = range(5)

MAX_PATCH_NUMEL = 4 << 28
MAX_PATCHES = 1 << 16
MAX_STEPS = 1 << 16
MAX_ITERATION = (1 << 32) - 1
MAX_CHAIN_ID = (1 << 32) - 1

_WORD = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_UNIFORM_SCALE = 4.6566127342e-10


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on counter words held in int64 tensors (broadcastable); returns four words in [0, 2**32)."""
    c0, c1, c2, c3 = (c.clone() for c in torch.broadcast_tensors(c0, c1, c2, c3))
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits right. c1 and c3 may keep garbage above bit 31: they are only
        # added in by xor, and the mask comes after that.
        low0, low1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (low1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (low0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = low1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def patch_normals(
    seed: int,
    stream: int,
    step: Tensor | int,
    iteration: Tensor | int,
    chain_ids: Tensor,
    patches: Tensor,
    numel: int,
) -> Tensor:
    """Standard normals (B, A, numel) float32 for the patches (B, A) of chains (B,); step and iteration are scalars."""
    quad = torch.arange(-(-numel // 4), device=patches.device)
    words = philox_4x32(
        quad + (stream << 28),
        (patches.long() + step * (1 << 16))[:, :, None],
        _as_tensor(iteration, patches.device),
        chain_ids[:, None, None],
        seed,
    )
    u = [_to_uniform(word) for word in words]
    normals = torch.stack([*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])], dim=-1)
    return normals.flatten(-2)[..., :numel]


def patch_keys(seed: int, stream: int, iteration: Tensor | int, chain_ids: Tensor, num_patches: int) -> Tensor:
    """The 32-bit keys (B, N) int64 by which patches are chosen."""
    patches = torch.arange(num_patches, device=chain_ids.device)
    stream = _as_tensor(stream << 28, chain_ids.device)
    iteration = _as_tensor(iteration, chain_ids.device)
    return philox_4x32(stream, patches, iteration, chain_ids[:, None], seed)[0]


def _to_uniform(word: Tensor) -> Tensor:
    return torch.where(word > _WORD >> 1, _WORD - word, word).float().mul_(_UNIFORM_SCALE)


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = u1.clamp_(min=1e-7).log_().mul_(-2).sqrt_()
    angle = u2.mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def _as_tensor(value: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=device)
