"""95 % confidence intervals for shares of samples, for paired differences of them, and for means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Z = 1.959963984540054  # the normal distribution's 97.5 % point


class Estimate(NamedTuple):
    """A value with its 95 % interval; low and high are None where too few samples tell none."""

    value: float
    low: float | None
    high: float | None

    def percent(self) -> str:
        return f"{100 * self.value:.1f} %" + self._interval(lambda x: f"{100 * x:.1f}")

    def points(self) -> str:
        return f"{100 * self.value:+.1f} points" + self._interval(lambda x: f"{100 * x:+.1f}")

    def plain(self) -> str:
        return _short(self.value) + self._interval(_short)

    def _interval(self, written: Callable[[float], str]) -> str:
        return "" if self.low is None or self.high is None else f" [{written(self.low)}, {written(self.high)}]"


def share(successes: Tensor) -> Estimate:
    """The share of True in a bool tensor (B,), with the score interval (Wilson 1927)."""
    return share_of(int(successes.sum()), successes.numel())


def share_of(successes: int, n: int) -> Estimate:
    """The share of `successes` among n, as `share` has it."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low = max(0.0, centre - half) if successes else 0.0  # without a rounding
    high = min(1.0, centre + half) if successes < n else 1.0
    return Estimate(p, low, high)


def paired_gain(before: Tensor, after: Tensor) -> Estimate:
    """The gain in the share of True over the same samples, bool tensors (B,), with the interval of Agresti & Min 2005.

    That is Wald's interval after half a sample is added to each of the four outcomes, so it holds for few samples too.
    """
    return gain_of(int((after & ~before).sum()), int((before & ~after).sum()), before.numel())


def gain_of(fixed: int, broken: int, n: int) -> Estimate:
    """The gain of n samples, `fixed` of which became True and `broken` False, as `paired_gain` has it."""
    if n == 0:
        return Estimate(math.nan, -1.0, 1.0)
    centre = (fixed - broken) / (n + 2)
    half = Z * math.sqrt(fixed + broken + 1 - (fixed - broken) ** 2 / (n + 2)) / (n + 2)
    return Estimate((fixed - broken) / n, max(-1.0, centre - half), min(1.0, centre + half))


def mcnemar(fixed: int, broken: int) -> float:
    """The two-sided p-value of McNemar's exact test: as many samples fixed as broken, but for chance (McNemar 1947)."""
    n, fewer = fixed + broken, min(fixed, broken)
    if 2 * fewer == n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(fewer + 1)]
    largest = max(logs)
    log_sum = largest + math.log(sum(math.exp(each - largest) for each in logs))
    return min(1.0, 2 * math.exp(log_sum - n * math.log(2)))


def paired_changes(before: Tensor, after: Tensor) -> dict:
    """The paired gain, and the samples that became True (fixed) or False (broken); bool tensors (B,)."""
    return {
        "gain": paired_gain(before, after),
        "fixed": int((after & ~before).sum()),
        "broken": int((before & ~after).sum()),
    }


def mean(values: Tensor) -> Estimate:
    """The mean of numbers (B,) from 0 on, with the normal approximation's interval; with none for fewer than two."""
    value, n = values.double().mean().item(), values.numel()
    return _mean(value, values.double().std().item() if n > 1 else math.nan, n)


def mean_of(total: float, squares: float, n: int) -> Estimate:
    """The mean of n numbers with these sums of themselves and of their squares, as `mean` has it."""
    value = total / n
    return _mean(value, math.sqrt(max(0.0, squares - n * value**2) / max(1, n - 1)), n)


def _mean(value: float, deviation: float, n: int) -> Estimate:
    if n < 2:
        return Estimate(value, None, None)
    half = Z * deviation / math.sqrt(n)
    return Estimate(value, max(0.0, value - half), value + half)


def _short(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")
