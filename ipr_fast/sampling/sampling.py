"""How a call denoises, and what each of its iterations renoises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ipr_fast.kernels.renoise import PatchChoice
from ipr_fast.sampling.schedule import Schedule


@dataclass(frozen=True)
class Sampling:
    """How to denoise: the schedule, eta, tau and the seed.

    fixed_noise: renoise a patch with its noise of the initial generation, every time the same.
    """

    schedule: Schedule
    stochasticity: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    fixed_noise: bool = False


class Selection(NamedTuple):
    """The patches of one iteration.

    mask    (B, N) bool
    counts  (B,) int64 on the CPU, numbers of patches that no chain exceeds
    choice  to be made by the engine, which then writes the mask
    varies  whether counts are others in each iteration
    """

    mask: Tensor
    counts: Tensor
    choice: PatchChoice | None = None
    varies: bool = False
