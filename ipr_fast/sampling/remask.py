"""Remasking: tokens that a regeneration has revealed may be masked again, and drawn anew.

A step takes the visible share of the active positions from alpha to alpha'. Each position that is visible before it is
masked again with probability sigma <= sigma_max = min(1, (1 - alpha') / alpha), and as many more of the masked ones are
revealed, on average: so the visible share is that of a run without remasking.

Source: Wang et al. 2025, "Remasking Discrete Diffusion Models with Inference-Time Scaling" (ReMDM), and its names;
"quality" from Kim et al. 2025, "Fine-Tuning Masked Diffusion for Provable Self-Correction" (PRISM).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipr_fast import checks


@dataclass(frozen=True)
class Remasking:
    """Base class of remasking strategies; shares and probabilities are float64 tensors of one shape.

    by_confidence: sigma is divided among the visible positions of a chain, see `Conf`. by_quality: by the model's
    ratings, see `Quality`.
    """

    by_confidence = False
    by_quality = False

    def visible(self, elapsed: Tensor) -> Tensor:
        """Return alpha, the visible share after a share `elapsed` in [0, 1] of the steps; 0 at 0, 1 at 1."""
        return elapsed

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the probability of remasking in a step from alpha = `before` to `after` that begins at `elapsed`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cap(Remasking):
    """sigma = min(eta, sigma_max), eta in [0, 1]."""

    eta: float = 0.008

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return largest_sigma(before, after).clamp(max=self.eta)


@dataclass(frozen=True)
class Rescale(Remasking):
    """sigma = eta sigma_max, eta in [0, 1]."""

    eta: float = 0.015

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return self.eta * largest_sigma(before, after)


@dataclass(frozen=True)
class Conf(Remasking):
    """sigma_l = sigma_max softmax_l(-psi_l) over a chain's visible active positions l.

    psi is the token's confidence when it was revealed, so that the least certain are masked again most often.
    """

    by_confidence = True

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return largest_sigma(before, after)


@dataclass(frozen=True)
class Quality(Conf):
    """As `Conf`, with psi the model's rating of the token that stands there now: `TokenPrediction.quality`."""

    by_quality = True


@dataclass(frozen=True)
class Loop(Remasking):
    """Reveal a share `alpha`, hold it while remasking with sigma = min(eta, sigma_max), then reveal the rest.

    The time t falls from 1 to 0 over the steps; it holds from `on` to `off`, 0 < off < on < 1.
    """

    on: float = 0.55
    off: float = 0.05
    alpha: float = 0.9
    eta: float = 0.02

    def __post_init__(self) -> None:
        for name in ("on", "off", "alpha", "eta"):
            checks.number(name, getattr(self, name), 0, 1)
        if not 0 < self.off < self.on < 1:
            raise ValueError(f"on and off must satisfy 0 < off < on < 1, got on {self.on} and off {self.off}")

    def visible(self, elapsed: Tensor) -> Tensor:
        t = 1 - elapsed
        rising, ending = self.alpha * elapsed / (1 - self.on), self.alpha + (1 - self.alpha) * (1 - t / self.off)
        return torch.where(t >= self.on, rising, torch.where(t > self.off, self.alpha, ending)).clamp(0, 1)

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        t = 1 - elapsed
        holds = (t <= self.on + TIME_ROUNDING) & (t > self.off + TIME_ROUNDING)
        return largest_sigma(before, after).clamp(max=self.eta) * holds


@dataclass(frozen=True)
class ForwardBackward(Remasking):
    """sigma = min((alpha' - alpha) / alpha, sigma_max): a step back by one step after each step forward."""

    def sigma(self, elapsed: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return torch.minimum((after - before) / before.clamp_min(SMALLEST), largest_sigma(before, after))


SMALLEST = 1e-300  # in place of alpha = 0, where no position is visible
TIME_ROUNDING = 1e-12  # of a time computed as 1 - s / T

REMASKINGS: dict[str, Callable[[], Remasking]] = {
    "cap": Cap,
    "rescale": Rescale,
    "conf": Conf,
    "loop": Loop,
    "forward_backward": ForwardBackward,
    "quality": Quality,
}


def largest_sigma(before: Tensor, after: Tensor) -> Tensor:
    """Return sigma_max = min(1, (1 - alpha') / alpha) for alpha = `before` and alpha' = `after`."""
    return ((1 - after) / before.clamp_min(SMALLEST)).clamp(0, 1)


def remasking(value: object) -> Remasking | None:
    """Return a strategy, or the one of a name with its published settings; None for none."""
    if value is None or (isinstance(value, Remasking) and type(value) is not Remasking):
        return value
    if isinstance(value, str) and value in REMASKINGS:
        return REMASKINGS[value]()
    raise ValueError(
        f"remask must be None, one of {', '.join(REMASKINGS)}, or a strategy of ipr_fast.sampling.remask, got {value!r}"
    )
