"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011) and Box-Muller normals.

    key     = the 64-bit seed
    counter = (stream << 28 | quad, step << 16 | patch, iteration, chain id)

`quad` is element // 4 within the patch: one counter gives four 32-bit words, and these give four normals. A number
depends on the seed and its counter alone, never on the batch, slot, device or order of drawing.

The conversions are Triton's: a word w, read as a signed int32, gives u = (w if w >= 0 else -w - 1) * 4.6566127342e-10
in [0, 1); two uniforms give sqrt(-2 ln max(u1, 1e-7)) * (cos, sin)(2 pi u2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ipr_fast.kernels.launch import jit

try:
    import triton.language as tl
    from triton.language.random import philox_impl
except ImportError:  # macOS and Windows
    tl = philox_impl = None

STREAM_INITIAL, STREAM_RENOISE, STREAM_POSTERIOR, STREAM_CHOICE, STREAM_SWAP = range(5)
STREAM_TOKENS, STREAM_ORDER, STREAM_REMASK, STREAM_ACCEPT, STREAM_POLICIES = range(5, 10)

MAX_KEY = (1 << 32) - 1
MAX_PATCH_NUMEL = 4 << 28
MAX_PATCHES = 1 << 16
MAX_STEPS = 1 << 16
MAX_ITERATION = (1 << 32) - 1
MAX_CHAIN_ID = (1 << 32) - 1

_WORD = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_UNIFORM_SCALE = 4.6566127342e-10


@jit
def normals_4(c0, c1, c2, c3, seed):
    """Four standard normals for each counter; words as int32, of shapes that broadcast."""
    c0, c1, c2, c3 = words_4(c0, c1, c2, c3, seed)
    n0, n1 = box_muller(uniform(c0), uniform(c1))
    n2, n3 = box_muller(uniform(c2), uniform(c3))
    return n0, n1, n2, n3


@jit
def words_4(c0, c1, c2, c3, seed):
    """Philox4x32-10 of counter words of any integer type, as uint32; seed is an int64 of the seed's 64 bits."""
    zero = c0 * 0 + c1 * 0 + c2 * 0 + c3 * 0  # of the broadcast shape
    c0, c1, c2, c3 = (
        (c0 + zero).to(tl.uint32),
        (c1 + zero).to(tl.uint32),
        (c2 + zero).to(tl.uint32),
        (c3 + zero).to(tl.uint32),
    )
    return philox_impl(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@jit
def uniform(word):
    """A uniform in [0, 1) from a word."""
    word = word.to(tl.int32, bitcast=True)
    return tl.where(word < 0, ~word, word) * 4.6566127342e-10


@jit
def box_muller(u1, u2):
    """Two normals from two uniforms.

    Logarithm, sine and cosine are Moshier's polynomials (Cephes) after an exact reduction of the argument. The
    hardware's logarithm is off by 2e-7 near 0, and Triton's sine and cosine have a slow path for large arguments, which
    do not occur: four normals take 22 registers, 28 with Triton's functions (3.9, sm_90; no stack in either case).
    """
    radius = tl.sqrt_rn(-2.0 * log(tl.maximum(u1, 1.0e-7)))
    turns = 4.0 * u2
    quarter = tl.floor(turns + 0.5)
    x = (turns - quarter) * 1.5707963267948966  # in [-pi/4, pi/4]
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    q = quarter.to(tl.int32)
    odd = (q & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((q + 1) & 2) == 2, -c, c)
    s = tl.where((q & 2) == 2, -s, s)
    return radius * c, radius * s


@jit
def log(u):
    """The natural logarithm of a positive normal float32."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa is in [sqrt(1/2), sqrt(2))
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    y = 7.0376836292e-2
    y = y * x - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    e = exponent.to(tl.float32)
    return x + (x * z * y - 0.5 * z - 2.12194440e-4 * e) + 0.693359375 * e


def seed_tensor(seed: int, device: torch.device | str) -> Tensor:
    """Return the 64 bits of a seed as a scalar int64 on the device, as the operations take it."""
    return torch.full((), seed - (seed >> 63 << 64), dtype=torch.int64, device=device)


def philox_4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words in [0, 2**32) from counter words in broadcastable int64 tensors: Philox of ten rounds."""
    c0, c1, c2, c3 = (c.clone() for c in torch.broadcast_tensors(c0, c1, c2, c3))
    words, rounds = (seed & _WORD, seed >> 32 & _WORD), torch.arange(10, device=c0.device)
    keys = ((word + rounds * step & _WORD).unbind() for word, step in zip(words, _KEY_STEPS, strict=True))
    for k0, k1 in zip(*keys, strict=True):
        # int64 products wrap, which leaves their 64 bits right. c1 and c3 may keep garbage above bit 31: they are only
        # used in xor, before the mask.
        low0, low1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (low1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (low0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = low1, low0
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def patch_normals(
    seed: Tensor | int,
    stream: int,
    step: Tensor | int,
    iteration: Tensor | int,
    chain_ids: Tensor,
    patches: Tensor,
    numel: int,
) -> Tensor:
    """Return normals (B, A, numel) float32 for patches (B, A) of chains (B,); step is a scalar or (B, 1)."""
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


def patch_keys(seed: Tensor | int, stream: int, iteration: Tensor | int, chain_ids: Tensor, num_patches: int) -> Tensor:
    """Return the 32-bit keys (B, N) int64 by which patches are chosen."""
    device = chain_ids.device
    c0, c1, c2 = (
        _as_tensor(stream << 28, device),
        torch.arange(num_patches, device=device),
        _as_tensor(iteration, device),
    )
    return philox_4x32(c0, c1, c2, chain_ids[:, None], seed)[0]


def step_keys(
    seed: Tensor | int, stream: int, step: Tensor | int, iteration: Tensor | int, chain_ids: Tensor, patches: Tensor
) -> Tensor:
    """Return 32-bit keys (B, A) int64 of patches (B, A) of chains (B,); step is a scalar or (B, 1)."""
    device = patches.device
    c0, c1 = _as_tensor(stream << 28, device), patches.long() + step * (1 << 16)
    return philox_4x32(c0, c1, _as_tensor(iteration, device), chain_ids[:, None], seed)[0]


def _to_uniform(word: Tensor) -> Tensor:
    return torch.minimum(word, _WORD - word).float().mul_(_UNIFORM_SCALE)


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = u1.clamp_(min=1e-7).log_().mul_(-2).sqrt_()
    angle = u2.mul_(2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def _as_tensor(value: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=device)
