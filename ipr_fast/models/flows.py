"""The noising processes that networks are trained with, and their times for the engine's levels.

A process z = a x + b eps is rectified flow in other units: the level is t = b / (a + b), and z / (a + b) is
(1 - t) x + t eps. So a flow here is two functions of t: the network's own time, and the scale a + b. Variance is
preserved, a^2 + b^2 = 1, where a + b = (t^2 + (1 - t)^2)^(-1/2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ipr_fast import checks


class Flow(nn.Module):
    """A process z = a x + b eps, by the engine's levels t.

    max_level: the level of its last time; 1 is pure noise. preserves_variance: a^2 + b^2 = 1. speed: what its velocity
    dz/dtime is of a eps - b x, for rectified flow of eps - x; None where that is no constant.
    """

    max_level = 1.0
    preserves_variance = True
    speed: float | None = None

    def time(self, t: Tensor) -> Tensor:
        """Return the network's times of levels t, those of the first and of the last time beyond these."""
        raise NotImplementedError

    def scale(self, t: Tensor) -> Tensor:
        """Return a + b at levels t."""
        return torch.rsqrt(t.square() + (1 - t).square())


class RectifiedFlow(Flow):
    """z = (1 - t) x + t eps, whose time is the level (Liu et al. 2022)."""

    preserves_variance = False
    speed = 1.0

    def time(self, t: Tensor) -> Tensor:
        return t

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class CosineFlow(Flow):
    """a = cos h, b = sin h with h = pi / 2 (time + skew) / (1 + skew), times 0..1 (Nichol and Dhariwal 2021)."""

    def __init__(self, skew: float = 0.0) -> None:
        super().__init__()
        self.skew = checks.number("skew", skew, 0)
        self.speed = math.pi / 2 / (1 + self.skew)

    def time(self, t: Tensor) -> Tensor:
        return (torch.atan2(t, 1 - t) / (math.pi / 2) * (1 + self.skew) - self.skew).clamp(0, 1)


class CosineLogSNRFlow(Flow):
    """b / a = tan(h) / shift with h linear in time, times 0..1 (Hoogeboom et al. 2023, "simple diffusion").

    logsnr_min, logsnr_max: log (a / b)^2 at the last and the first time before the shift.
    """

    def __init__(self, logsnr_min: float = -15.0, logsnr_max: float = 15.0, shift: float = 1.0) -> None:
        super().__init__()
        low, high = checks.number("logsnr_min", logsnr_min, -80), checks.number("logsnr_max", logsnr_max, -80, 80)
        if low >= high:
            raise ValueError(f"logsnr_min must be less than logsnr_max, got {low:g} and {high:g}")
        self.shift = checks.number("shift", shift, 1e-6)
        self.first, self.last = (math.atan(math.exp(-0.5 * logsnr)) for logsnr in (high, low))
        self.max_level = _level_of_ratio(math.exp(-0.5 * low) / self.shift)

    def time(self, t: Tensor) -> Tensor:
        return ((torch.atan2(self.shift * t, 1 - t) - self.first) / (self.last - self.first)).clamp(0, 1)


class LinearBetaFlow(Flow):
    """a^2 = exp(-(low s + (high - low) s^2 / 2)) at the times s in 0..1 (Song et al. 2021, "VP")."""

    def __init__(self, low: float = 0.1, high: float = 20.0) -> None:
        super().__init__()
        self.low, self.high = checks.number("low", low, 1e-9, 700), checks.number("high", high, 1e-9, 700)
        self.max_level = _level_of_ratio(math.sqrt(math.expm1((self.low + self.high) / 2)))

    def time(self, t: Tensor) -> Tensor:
        integral = torch.log1p((t / (1 - t).clamp_min(2**-24)).square())  # -log a^2
        root = (self.low**2 + 2 * (self.high - self.low) * integral).clamp_min(0).sqrt()
        return (2 * integral / (self.low + root)).clamp(0, 1)


class DiscreteFlow(Flow):
    """a^2 = alphas_bar[time] for the times 0..T-1 of a network with discrete steps (Ho et al. 2020).

    alphas_bar (T,): falling, in [0, 1]. whole: round times to whole numbers, for networks that look them up; else times
    are interpolated, linearly in the level.
    """

    level_bits: Tensor  # of `levels`, int32: a module's cast to another type of floats leaves them

    def __init__(self, alphas_bar: Tensor, *, whole: bool = False) -> None:
        super().__init__()
        try:
            found = torch.as_tensor(alphas_bar, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"alphas_bar must be a tensor (T,), got {checks.described(alphas_bar)}") from error
        if (
            found.ndim != 1
            or len(found) < 2
            or not bool((found.diff() < 0).all() & (found >= 0).all() & (found <= 1).all())
        ):
            raise ValueError(
                f"alphas_bar must fall from at most 1 to at least 0, (T,), got {checks.described(found)}; of betas, it "
                "is (1 - betas).cumprod(0)"
            )
        a, b = found.sqrt(), (1 - found).sqrt()
        levels = b / (a + b)
        self.whole, self.max_level = checks.boolean("whole", whole), float(levels[-1])
        self.register_buffer("level_bits", levels.float().view(torch.int32), persistent=False)

    @property
    def levels(self) -> Tensor:
        """The level of each time: (T,) float32, rising."""
        return self.level_bits.view(torch.float32)

    def time(self, t: Tensor) -> Tensor:
        levels = self.levels
        above = torch.searchsorted(levels, t.contiguous()).clamp_(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        time = above - 1 + ((t - low) / (high - low)).clamp(0, 1)
        return time.round() if self.whole else time


def _level_of_ratio(ratio: float) -> float:
    """Return b / (a + b) of b / a."""
    return ratio / (1 + ratio)
