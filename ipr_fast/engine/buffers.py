"""The tensors of the lanes: allocated once, then overwritten by every chain that passes through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ipr_fast.kernels.categorical import Drawn
from ipr_fast.kernels.slot_inputs import SlotInputs
from ipr_fast.sampling.condition import Condition, Layout
from ipr_fast.sampling.patches import ActivePatches


@dataclass(frozen=True)
class _Buffers:
    def first(self, num_lanes: int) -> Self:
        """Return views of the first lanes; scalars are shared by all lanes."""
        return replace(self, **{name: _first(value, num_lanes) for name, value in vars(self).items()})


def _first(value: Any, num_lanes: int) -> Any:
    if isinstance(value, Tensor):
        return value[:num_lanes] if value.ndim else value
    if isinstance(value, Drawn):
        return Drawn(*(each[:num_lanes] for each in value))
    return None if value is None else value.first(num_lanes)


@dataclass(frozen=True)
class LaneState(_Buffers):
    """The chains in W lanes, and the counters that they share."""

    values: Tensor  # (W, N, ...), patches or tokens
    chain_ids: Tensor  # (W,) int64
    mask: Tensor  # (W, N) bool, the active patches of this iteration
    free: Tensor  # (W, N) bool, the patches to choose from
    size: Tensor  # (W,) int64, how many to choose
    step: Tensor  # (W,) int64, the last step of the regeneration that was done, -1 before the first
    iteration: Tensor  # () int64, counter of the noise
    choice_iteration: Tensor  # () int64, counter of the choice of patches
    origin: Tensor  # () int64, always 0: the iteration of the initial generation
    seed: Tensor  # () int64
    condition: Condition | None = None  # of each lane's chain

    @classmethod
    def allocate(cls, values: Tensor, layout: Layout | None = None) -> LaneState:
        """Allocate the state of lanes for chains of these values, with conditions of this layout."""
        (num_lanes, num_patches), device = values.shape[:2], values.device
        chain_ids, size, step = torch.zeros(3, num_lanes, device=device, dtype=torch.int64).unbind()
        mask, free = torch.zeros(2, num_lanes, num_patches, device=device, dtype=torch.bool).unbind()
        iteration, choice, origin, seed = (torch.zeros((), device=device, dtype=torch.int64) for _ in range(4))
        condition = None if layout is None else layout.allocate(num_lanes, device)
        return cls(values, chain_ids, mask, free, size, step, iteration, choice, origin, seed, condition)

    def clear(self) -> None:
        """Make the lanes idle: with nothing to choose, no slot is taken and no patch moves."""
        for buffer in (self.values, self.mask, self.free, self.size):
            buffer.zero_()


@dataclass(frozen=True)
class SlotState(_Buffers):
    """The active patches, or positions of tokens, of W lanes, in A slots each."""

    values_name: ClassVar[str]  # of a model's argument that takes a chain's values

    index: Tensor  # (W, A) int32, ids, padded with -1
    count: Tensor  # (W,) int32

    @property
    def active(self) -> ActivePatches:
        return ActivePatches(self.index, self.count)


@dataclass(frozen=True)
class PatchSlots(SlotState):
    """The slots of patches."""

    values_name = "patches"

    level: Tensor  # (W, A) float32
    previous_level: Tensor  # (W, A) float32, before the last step
    start: Tensor  # (W, A) int32, the step at which the patch starts, -1 while it waits
    inputs: SlotInputs | None = None  # of a model that takes them
    mean: Tensor | None = None  # (W, A) float32, the mean log-variance of the steps that denoised the slot

    @classmethod
    def allocate(
        cls,
        num_lanes: int,
        num_slots: int,
        device: torch.device,
        patches: tuple[int, int] = (0, 0),
        dtype: torch.dtype | None = None,
        signals: bool = False,
    ) -> PatchSlots:
        """Allocate slots; with inputs of N patches of P numbers, `patches`, if a type is given, and with signals."""
        whole = torch.zeros(4, num_lanes, num_slots, dtype=torch.int32, device=device)
        index, start, *levels = (buffer.data for buffer in whole)  # with `data`, each has a version counter of its own
        level, previous_level = (buffer.view(torch.float32) for buffer in levels)
        count = torch.zeros(num_lanes, dtype=torch.int32, device=device)
        inputs = None if dtype is None else SlotInputs.allocate(num_lanes, num_slots, *patches, dtype, device)
        mean = torch.zeros(num_lanes, num_slots, dtype=torch.float32, device=device) if signals else None
        return cls(index, count, level, previous_level, start, inputs, mean)

    def written(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return what a step writes, of the tensors that a model's call gets; values (W, N, P): the lanes'."""
        return (values, self.level, *(() if self.inputs is None else self.inputs))


@dataclass(frozen=True)
class TokenSlots(SlotState):
    """The slots of tokens."""

    values_name = "tokens"

    hidden: Tensor  # (W, A) int32, the ids of the positions that are masked, else -1
    psi: Tensor  # (W, A) float32, the confidence of a token when it was revealed
    drawn: Drawn | None = None  # (W, A), each slot's last draw

    @classmethod
    def allocate(cls, num_lanes: int, num_slots: int, device: torch.device, signals: bool = False) -> TokenSlots:
        index, hidden = (torch.zeros(num_lanes, num_slots, dtype=torch.int32, device=device) for _ in range(2))
        count = torch.zeros(num_lanes, dtype=torch.int32, device=device)
        psi = torch.zeros(num_lanes, num_slots, dtype=torch.float32, device=device)
        drawn = Drawn(*(each.zero_() for each in Drawn.empty(num_lanes, num_slots, device))) if signals else None
        return cls(index, count, hidden, psi, drawn)
