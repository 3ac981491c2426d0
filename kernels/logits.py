"""Rows of logits as kernels and twins read them: float32, LOWEST for forbidden ids and for logits below it.

LOWEST is finite, so that a difference of two logits is never infinite or NaN unless a logit is.
"""

from __future__ import annotations

from contextlib import suppress
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.launch import jit

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

MAX_VOCABULARY = 1 << 18
LOWEST = -1e30
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # LOWEST over any of them leaves no probability
CACHED = 1 << 16  # logits that a twin takes at once


@jit
def read_logits(p_logits, p_forbidden, o_row, o_id, m_row, V, FORBIDDEN: tl.constexpr):
    """Logits, -1e30 where they are masked, forbidden or lower."""
    b_logits = tl.load(p_logits + o_row + o_id, mask=m_row & (o_id < V), other=float("-inf")).to(tl.float32)
    if FORBIDDEN:
        b_logits = tl.where(tl.load(p_forbidden + o_id, mask=o_id < V, other=0) != 0, -1.0e30, b_logits)
    return tl.where(b_logits < -1.0e30, -1.0e30, b_logits)


class Rows(NamedTuple):
    """Rows of logits (n, V); forbidden: (V,) bool."""

    logits: Tensor
    forbidden: Tensor | None

    def of(self, ids: Tensor) -> Tensor:
        """Return the logits of ids (n, k)."""
        logits = self.logits.gather(1, ids).float()
        return (logits if self.forbidden is None else logits.masked_fill(self.forbidden[ids], LOWEST)).clamp(min=LOWEST)

    def write(self, into: Tensor) -> None:
        """Write the logits into a buffer (n, W), W >= V, and LOWEST beyond V."""
        vocabulary = self.logits.shape[1]
        into[:, vocabulary:] = LOWEST
        into[:, :vocabulary] = self.logits
        if self.forbidden is not None:
            into[:, :vocabulary].masked_fill_(self.forbidden, LOWEST)
        into.clamp_(min=LOWEST)

    def sums(self, classes: int, inverse: float, threshold: Tensor | None) -> list[Tensor]:
        """Return the largest logit m, its id, the second - m, R and W, all (n, 1), and Z by class (n, C).

        R = sum exp(l - m) over the other ids, W = sum (l - m) exp(l - m), Z = sum exp((l - m) inverse) over the ids
        from the threshold (n, 1) up.
        Takes a few rows at a time, in buffers that stay in the cache: four times as fast as all rows at once.
        """
        number, vocabulary = self.logits.shape
        at_once, width = max(1, CACHED // vocabulary), -(-vocabulary // classes) * classes
        buffers = torch.empty(3, min(at_once, number), width, dtype=torch.float32, device=self.logits.device)
        found = []
        for i in range(0, number, at_once):
            few = self._replace(logits=self.logits[i : i + at_once])
            below, weight, product = buffers[:, : len(few.logits)]
            few.write(below)
            left_out = None if threshold is None else below < threshold[i : i + at_once]
            largest, top = below.max(dim=1, keepdim=True)
            torch.exp(below.sub_(largest), out=weight)
            W = torch.mul(weight, below, out=product).sum(1, keepdim=True)
            R = weight.scatter_(1, top, 0).sum(1, keepdim=True)
            if inverse == 1:
                weight.scatter_(1, top, 1)
            else:
                torch.mul(below, inverse, out=weight).exp_()
            if left_out is not None:
                weight.masked_fill_(left_out, 0)
            second = below.scatter_(1, top, LOWEST).amax(1, keepdim=True)
            found.append((largest, top, second, R, W, weight.unflatten(1, (-1, classes)).sum(1)))
        return [torch.cat(each) for each in zip(*found, strict=True)]


def bytes_moved(slots: int, vocabulary: int, size: int) -> int:
    """Return the bytes that must move for `slots` slots that are not padding, with logits of `size` bytes."""
    return slots * vocabulary * size


def check_logits(logits: Tensor) -> None:
    """Raise ValueError for logits (B, A, V) whose rows are too long or not contiguous."""
    vocabulary = logits.shape[2]
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits must have 1 to {MAX_VOCABULARY:,} ids, got {vocabulary:,}")
    if vocabulary > 1 and logits.stride(2) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")


def check_temperature(temperature: object, above_zero: bool = False) -> float:
    """Return a temperature; ValueError for one that is neither 0 nor in MIN_TEMPERATURE..MAX_TEMPERATURE."""
    if not isinstance(temperature, bool) and isinstance(temperature, Real):
        with suppress(OverflowError):  # of an int
            found = float(temperature)
            if MIN_TEMPERATURE <= found <= MAX_TEMPERATURE or (found == 0 and not above_zero):
                return found
    zero = "" if above_zero else "0 or "
    raise ValueError(f"temperature must be {zero}in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got {temperature!r}")
