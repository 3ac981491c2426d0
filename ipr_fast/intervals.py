"""95 % confidence intervals for shares of samples, and for paired differences of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Z = 1.959963984540054  # the normal distribution's 97.5 % point


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def points(self) -> str:
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def share(successes: Tensor) -> Estimate:
    """The share of True in a bool tensor (B,), with the score interval (Wilson 1927)."""
    n = successes.numel()
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    p = successes.double().mean().item()
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_gain(before: Tensor, after: Tensor) -> Estimate:
    """The mean of after - before over the same samples, bool tensors (B,), by the normal approximation."""
    n = before.numel()
    if n < 2:
        return Estimate(math.nan, -1.0, 1.0)
    difference = after.double() - before.double()
    mean, half = difference.mean().item(), Z * difference.std().item() / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)
