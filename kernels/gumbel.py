"""Gumbel numbers of 64 random bits, for draws from categorical laws.

    g(n) = -log(-log1p(-u)),  u = (bits + 1/2) 2^-64,  bits = words 0 and 1 (n even) or 2 and 3 (n odd) of quad n // 2

of STREAM_TOKENS at place step << 16 | position; the first word is the higher one. Large numbers are those of small u,
where float32 is fine: they reach 45. Uniforms of 24 bits end at 17 and lose what is less likely than 2^-24: of a tail
of 0.2 % over 126,464 ids they draw a fifteenth. u is kept below 1, to which float32 would round it: numbers start at
-2.81.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import jit
from ipr_fast.kernels.philox import STREAM_TOKENS, log, philox_4x32, words_4

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def log1p(x):
    """log(1 + x), in relative precision, for 1 + x a positive normal float32."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, log(y) * tl.div_rn(x, tl.where(y == 1.0, 1.0, y - 1.0)))  # after Kahan


@jit
def gumbel(high, low):
    """A Gumbel number of two words."""
    u = high.to(tl.float32) * 2.3283064365386963e-10 + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    return -log(-log1p(-tl.minimum(u, 0.999999940395355)))


@jit
def gumbels(FIRST: tl.constexpr, COUNT: tl.constexpr, place, iteration, chain_id, seed):
    """COUNT numbers of each row, from number FIRST; both even. The words are of shape (R, 1)."""
    quad = (5 << 28) | (FIRST // 2 + tl.arange(0, COUNT // 2)[None, :])
    w0, w1, w2, w3 = words_4(quad, place, iteration, chain_id, seed)
    return tl.interleave(gumbel(w0, w1), gumbel(w2, w3))


def row_gumbels(count: int, place: Tensor, iteration: Tensor, chain_ids: Tensor, seed: Tensor) -> Tensor:
    """Return the first `count` numbers of each row, (n, count), for place and chain_ids (n,); an even count."""
    quad = torch.arange(count // 2, device=place.device) + (STREAM_TOKENS << 28)
    w0, w1, w2, w3 = philox_4x32(quad, place[:, None], iteration, chain_ids[:, None], seed)
    return torch.stack((from_words(w0, w1), from_words(w2, w3)), dim=-1).flatten(-2)


def from_words(high: Tensor, low: Tensor) -> Tensor:
    """Return Gumbel numbers, float32, of two words each."""
    u = high.float().mul_(2.0**-32).add_(low.float().add_(0.5).mul_(2.0**-64))
    return u.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()
