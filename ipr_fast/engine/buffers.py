"""The buffers of the lanes: made once, then written to by every chain that passes through."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches


class _PerLane:
    def first(self, lanes: int) -> Any:
        """The first lanes of these buffers, as views."""
        return replace(self, **{name: getattr(self, name)[:lanes] for name in self.per_lane})


@dataclass(frozen=True)
class LaneState(_PerLane):
    """The buffers of W lanes, and the counters that all share."""

    patches: Tensor  # (W, N, P) float32
    chain_ids: Tensor  # (W,) int64
    mask: Tensor  # (W, N) bool, the patches of this iteration
    free: Tensor  # (W, N) bool, among which to choose
    size: Tensor  # (W,) int64, how many to choose
    step: Tensor  # () int64, of the regeneration under way
    iteration: Tensor  # () int64, of the random numbers
    choice_iteration: Tensor  # () int64, of the choice
    origin: Tensor  # () int64, 0: the iteration of the initial generation
    seed: Tensor  # () int64

    per_lane = ("patches", "chain_ids", "mask", "free", "size")

    @classmethod
    def allocate(cls, lanes: int, num_patches: int, numel: int, device: torch.device) -> LaneState:
        shapes = {"patches": (lanes, num_patches, numel), "mask": (lanes, num_patches), "free": (lanes, num_patches)}
        shapes |= {"chain_ids": (lanes,), "size": (lanes,)}
        types = {"patches": torch.float32, "mask": torch.bool, "free": torch.bool}
        buffers = {
            field.name: torch.zeros(shapes.get(field.name, ()), dtype=types.get(field.name, torch.int64), device=device)
            for field in fields(cls)
        }
        return cls(**buffers)


@dataclass(frozen=True)
class SlotState(_PerLane):
    """The buffers of a regeneration with A slots a lane."""

    index: Tensor  # (W, A) int32, patch ids, padded with -1
    count: Tensor  # (W,) int32
    level: Tensor  # (W, A) float32
    next_level: Tensor  # (W, A) float32
    start: Tensor  # (W, A) int32, -1 while waiting

    per_lane = ("index", "count", "level", "next_level", "start")

    @classmethod
    def allocate(cls, lanes: int, slots: int, device: torch.device) -> SlotState:
        whole = torch.zeros(4, lanes, slots, dtype=torch.int32, device=device)
        index, start, *levels = (buffer.data for buffer in whole)  # each counts what is written to it alone
        level, next_level = (buffer.view(torch.float32) for buffer in levels)
        return cls(index, torch.zeros(lanes, dtype=torch.int32, device=device), level, next_level, start)

    @property
    def active(self) -> ActivePatches:
        return ActivePatches(self.index, self.count)
