"""Schedules, which stagger the denoising of the active patches, and the sampling settings of a call."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor


class ScheduleTables(NamedTuple):
    """A schedule's integers for every number of active patches n = 0..N, all int32.

    steps  (N + 1,)    T, denoiser calls of one regeneration
    block  (N + 1,)    L, steps from a patch's start to level 0
    starts (N + 1, N)  S_k, the step at which the k-th patch starts; entries k >= n are never reached (2**31 - 1)
    """

    steps: Tensor
    block: Tensor
    starts: Tensor

    def to(self, device: torch.device | str) -> ScheduleTables:
        return ScheduleTables(*(table.to(device) for table in self))


@dataclass(frozen=True)
class Schedule:
    """How many steps a patch takes, and how far neighbours in time overlap.

    steps_per_patch: denoiser calls to bring one patch from noise to clean, an int >= 1.
    overlap: the share of a patch's steps that it spends together with the next one, in [0, 1]. 0 regenerates one patch
        after another; 1 all at once, which is ordinary parallel diffusion.

    Source: Wewer et al. 2025, Spatial Reasoning Models; the settings of Kang et al. 2026 are (3, 0.0) to generate and
    (10, 0.8) to refine Sudoku boards.
    """

    steps_per_patch: int
    overlap: float = 0.0

    def __post_init__(self) -> None:
        p, o = self.steps_per_patch, self.overlap
        if isinstance(p, bool) or not isinstance(p, Integral) or p < 1:
            raise ValueError(f"steps_per_patch must be an int >= 1, got {p!r}")
        if isinstance(o, bool) or not isinstance(o, Real) or not 0.0 <= o <= 1.0:
            raise ValueError(f"overlap must be a number in [0, 1], got {o!r}")
        object.__setattr__(self, "steps_per_patch", int(p))
        object.__setattr__(self, "overlap", float(o))

    def steps(self, num_active: int) -> int:
        """T, the denoiser calls of one regeneration of `num_active` patches; 0 for none."""
        return int(self._of(num_active).steps.tolist()[0])

    def block(self, num_active: int) -> int:
        """L, the steps from a patch's start to level 0; 0 for no patches."""
        return int(self._of(num_active).ideal_block.ceil().tolist()[0])

    def starts(self, num_active: int) -> list[int]:
        """S_k for k = 0..num_active-1, ascending."""
        return self._starts(num_active, self._of(num_active).ideal_block).to(torch.int64).tolist()

    def tables(self, num_patches: int) -> ScheduleTables:
        """The schedule for every number of active patches from 0 to `num_patches`."""
        never = torch.iinfo(torch.int32).max
        counts = torch.arange(num_patches + 1, device="cpu")
        integers = self._integers(counts)
        starts = self._starts(num_patches, integers.ideal_block[:, None]).to(torch.int32)
        return ScheduleTables(
            steps=integers.steps.to(torch.int32),
            block=integers.ideal_block.ceil().to(torch.int32),
            starts=starts.masked_fill(counts[:-1] >= counts[:, None], never),
        )

    def levels(self, num_patches: int) -> Tensor:
        """Every level that a patch can have under this schedule, (R,) float32, ascending from 0 to 1."""
        blocks = self.tables(num_patches).block[1:].unique().tolist()
        return torch.cat([torch.arange(b + 1, dtype=torch.float32, device="cpu") / b for b in blocks]).unique()

    def _of(self, num_active: int) -> _Integers:
        return self._integers(torch.tensor([num_active], device="cpu"))

    def _integers(self, counts: Tensor) -> _Integers:
        """T, and the block length before it is rounded up, of counts (n,) of active patches.

        The published code computes in float32, and in this order: both decide the ceilings at many counts. Its division
        of a Python int by a tensor is torch's `reciprocal() * int`.
        """
        p, stagger = self.steps_per_patch, 1 - self.overlap
        others = (counts - 1).to(torch.float32)
        steps = (p + others * stagger * p).ceil()
        ideal_block = (others * stagger + 1).reciprocal() * steps
        return _Integers(*(value.where(counts > 0, 0.0) for value in (steps, ideal_block)))

    def _starts(self, num_active: int, ideal_block: Tensor) -> Tensor:
        k = torch.arange(num_active, dtype=torch.float32, device="cpu")
        return (k * ideal_block * (1 - self.overlap)).floor()


class _Integers(NamedTuple):
    """float32, (n,) each."""

    steps: Tensor
    ideal_block: Tensor


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a call: the schedule, eta, tau and the seed.

    fixed_noise: renoise a patch with the noise of its initial generation in every iteration.
    """

    schedule: Schedule
    stochasticity: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    fixed_noise: bool = False
