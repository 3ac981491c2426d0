"""How the denoising of the active patches is staggered."""

from __future__ import annotations

import math
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
        if num_active == 0:
            return 0
        p = self.steps_per_patch
        # In float64 as it stands: where 1 - overlap rounds up, that is a step more than on paper.
        return math.ceil(p + (num_active - 1) * (1 - self.overlap) * p)

    def block(self, num_active: int) -> int:
        """L, the steps from a patch's start to level 0."""
        return int(self._ideal_blocks([num_active]).ceil())

    def starts(self, num_active: int) -> list[int]:
        """S_k for k = 0..num_active-1, ascending."""
        if num_active == 0:
            return []
        ideal = self._ideal_blocks([num_active])
        return self._starts(torch.arange(num_active, device="cpu"), ideal).to(torch.int64).tolist()

    def tables(self, num_patches: int) -> ScheduleTables:
        """The schedule for every number of active patches from 0 to `num_patches`."""
        never = torch.iinfo(torch.int32).max
        counts, k = (torch.arange(n, device="cpu") for n in (num_patches + 1, num_patches))
        ideal = self._ideal_blocks(counts.tolist())
        starts = self._starts(k, ideal[:, None]).to(torch.int32)
        return ScheduleTables(
            steps=torch.tensor([self.steps(n) for n in counts.tolist()], dtype=torch.int32, device="cpu"),
            block=ideal.ceil().to(torch.int32),
            starts=starts.masked_fill(k >= counts[:, None], never),
        )

    def levels(self, num_patches: int) -> Tensor:
        """Every level that a patch can have under this schedule, (R,) float32, ascending from 0 to 1."""
        blocks = {self.block(n) for n in range(1, num_patches + 1)}
        return torch.cat([torch.arange(b + 1, dtype=torch.float32, device="cpu") / b for b in sorted(blocks)]).unique()

    def _starts(self, k: Tensor, ideal_block: Tensor) -> Tensor:
        # float32 in this very order: it decides ties, and the published code's ties are the definition.
        return (k.float() * ideal_block * (1 - self.overlap)).floor()

    def _ideal_blocks(self, counts: list[int]) -> Tensor:
        """T / ((n - 1) (1 - o) + 1) for each n, float32; 0 for n = 0."""
        steps = torch.tensor([self.steps(n) for n in counts], dtype=torch.float32, device="cpu")
        spans = [(n - 1) * (1 - self.overlap) + 1 for n in counts]
        return torch.where(steps > 0, steps / torch.tensor(spans, dtype=torch.float32, device="cpu"), 0.0)
