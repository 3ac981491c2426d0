"""Schedules, which stagger the denoising of the active patches, and the sampling settings of a call.

For n active patches, which start in m = ceil(n / group) groups, with p = steps_per_patch and o = overlap:

    T   = ceil(p + (m - 1) (1 - o) p)        steps (denoiser calls) of one regeneration
    b   = T / ((m - 1) (1 - o) + 1)          ideal block length
    L   = ceil(b)                            steps from a patch's start to level 0
    S_k = floor((k // group) b (1 - o))      step at which the k-th patch starts, k = 0..n-1

Levels are s t / (1 + (s - 1) t), with s = shift and t = steps left / L.

The published code computes these in float32 and in this order, and both decide ceilings and ties at many n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.philox import MAX_PATCHES, MAX_STEPS


class ScheduleTables(NamedTuple):
    """A schedule's integers for every number of active patches n = 0..N, all int32, and its shift, float32.

    steps  (N + 1,)    T
    block  (N + 1,)    L
    starts (N + 1, N)  S_k; 2**31 - 1, a step that is never reached, for k >= n
    shift  (1,)        s
    """

    steps: Tensor
    block: Tensor
    starts: Tensor
    shift: Tensor

    def to(self, device: torch.device | str) -> ScheduleTables:
        return ScheduleTables(*(table.to(device) for table in self))


@dataclass(frozen=True)
class Schedule:
    """Steps per patch, and how far the steps of consecutive patches overlap.

    steps_per_patch: denoiser calls that take one patch from noise to clean, an int in [1, 65536].
    overlap: share of a patch's steps that it has in common with the next patch, in [0, 1]. 0 regenerates one patch
        after another; 1 regenerates all at once, which is ordinary parallel diffusion.
    shift: warps the levels t to s t / (1 + (s - 1) t), in [1e-3, 1e3]: above 1 more steps are spent near noise, as
        large samples need (Esser et al. 2024), below 1 near clean.
    group: patches that start at a time, an int in [1, 65536], the published `top_k`; the last group
        may be smaller.

    Source: Wewer et al. 2025, Spatial Reasoning Models; the settings of Kang et al. 2026 are (3, 0.0) to generate and
    (10, 0.8) to refine Sudoku boards.
    """

    steps_per_patch: int
    overlap: float = 0.0
    shift: float = 1.0
    group: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "steps_per_patch", checks.integer("steps_per_patch", self.steps_per_patch, 1, MAX_STEPS)
        )
        object.__setattr__(self, "overlap", checks.number("overlap", self.overlap, 0, 1))
        object.__setattr__(self, "shift", checks.number("shift", self.shift, 1e-3, 1e3))
        object.__setattr__(self, "group", checks.integer("group", self.group, 1, MAX_PATCHES))

    @property
    def values(self) -> tuple[Any, ...]:
        """(steps_per_patch, overlap), with shift and group where one of them is not 1."""
        first = self.steps_per_patch, self.overlap
        return first if self.shift == self.group == 1 else (*first, self.shift, self.group)

    def warp(self, t: Tensor) -> Tensor:
        """Return s t / (1 + (s - 1) t) for levels t, float32."""
        shift = torch.full((), self.shift, dtype=torch.float32, device=t.device)
        return shift * t / (1 + (shift - 1) * t)

    def steps(self, num_active: int) -> int:
        """T, the denoiser calls of one regeneration of `num_active` patches; 0 for none."""
        steps, _ = self._lengths(_count(num_active))
        return int(steps.tolist()[0])

    def block(self, num_active: int) -> int:
        """L, the steps from a patch's start to level 0; 0 for no patches."""
        _, ideal_block = self._lengths(_count(num_active))
        return int(ideal_block.ceil().tolist()[0])

    def starts(self, num_active: int) -> list[int]:
        """S_k for k = 0..num_active-1, ascending."""
        _, ideal_block = self._lengths(_count(num_active))
        return self._starts(num_active, ideal_block).to(torch.int64).tolist()

    def tables(self, num_patches: int) -> ScheduleTables:
        """Tabulate the schedule for every number of active patches from 0 to `num_patches`."""
        never = torch.iinfo(torch.int32).max
        counts = torch.arange(num_patches + 1, device="cpu")
        steps, ideal_block = self._lengths(counts)
        starts = self._starts(num_patches, ideal_block[:, None]).to(torch.int32)
        return ScheduleTables(
            steps=steps.to(torch.int32),
            block=ideal_block.ceil().to(torch.int32),
            starts=starts.masked_fill(counts[:-1] >= counts[:, None], never),
            shift=torch.tensor([self.shift], dtype=torch.float32, device="cpu"),
        )

    def levels(self, num_patches: int) -> Tensor:
        """List every level that a patch can have under this schedule: (R,) float32, ascending from 0 to 1."""
        _, ideal_block = self._lengths(torch.arange(1, num_patches + 1, device="cpu"))
        blocks = ideal_block.ceil().to(torch.int32).unique().tolist()
        left = torch.cat([torch.arange(b + 1, dtype=torch.float32, device="cpu") / b for b in blocks])
        return self.warp(left).clamp_(0, 1).unique()

    def _lengths(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """T and the ideal block length b, float32, for numbers n of active patches; both 0 for no patches.

        The published code divides a Python int by a tensor, which torch computes as `reciprocal() * int`.
        """
        p, stagger = self.steps_per_patch, 1 - self.overlap
        others = ((n - 1) // self.group).to(torch.float32)  # m - 1
        steps = (p + others * stagger * p).ceil()
        ideal_block = (others * stagger + 1).reciprocal() * steps
        return steps.where(n > 0, 0.0), ideal_block.where(n > 0, 0.0)

    def _starts(self, num_active: int, ideal_block: Tensor) -> Tensor:
        """S_k as float32, (..., num_active) for ideal block lengths (..., 1)."""
        k = (torch.arange(num_active, device="cpu") // self.group).to(torch.float32)
        return (k * ideal_block * (1 - self.overlap)).floor()


def _count(n: int) -> Tensor:
    """Return a number as a tensor (1,); the capture check would take `tolist` of a scalar for a synchronisation."""
    return torch.tensor([n], device="cpu")


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

    def num_steps(self, num_active: int) -> int:
        """Return the steps of one regeneration of `num_active` patches."""
        return self.schedule.steps(num_active)
