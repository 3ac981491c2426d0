"""The lanes: places for a fixed number of chains, with the two operations of an iteration, `begin` and `tick`.

Both work on the first lanes of buffers that are allocated once, the seed and the counters included. So a CUDA graph of
either one, captured for a number of lanes and slots, can be replayed for other chains, seeds and schedules.

Subclasses know what a chain holds: patches or tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ipr_fast.engine.buffers import LaneState, SlotState
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.precomputed import Precomputed
from ipr_fast.kernels.philox import seed_tensor
from ipr_fast.kernels.renoise import PatchChoice
from ipr_fast.sampling.condition import Layout
from ipr_fast.sampling.selection import Selection
from ipr_fast.trace import span


class LaneSettings(Protocol):
    """Arguments of a call that are constants in a captured graph; hashable."""

    @property
    def tf32(self) -> bool: ...

    @property
    def condition(self) -> Layout | None:
        """The form of the chains' conditions."""
        ...

    @property
    def signals(self) -> bool:
        """Whether the lanes keep what the model tells of its slots."""
        ...

    @property
    def schedule(self) -> Any:
        """A schedule to count bytes with."""
        ...

    def sample_shape(self, model: Any) -> tuple[int, int]:
        """Return N and the bytes of each of a chain's N patches or tokens."""
        ...

    def make_lanes(self, model: Any, num_lanes: int, device: torch.device) -> Lanes:
        """Allocate lanes for the chains of a model."""
        ...


class Lanes(ABC):
    """Lanes for the chains of one model, whose values have this shape (N, ...) and dtype."""

    def __init__(
        self,
        model: Any,
        num_lanes: int,
        device: torch.device,
        settings: LaneSettings,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.num_lanes, self.device, self.settings = model, num_lanes, device, settings
        self.precomputed = Precomputed(model, num_lanes, device)
        with torch.inference_mode(False):  # normal tensors count the writes to them
            values = torch.zeros(num_lanes, *shape, dtype=dtype, device=device)
            self.state = LaneState.allocate(values, settings.condition)
        self.schedule: Any = None
        self.eager = False  # no CUDA graphs: the host may look at the data between two ticks
        self._slots: dict[int, Any] = {}

    @torch.inference_mode()
    def set_sampling(self, seed: int, schedule: Any) -> bool:
        """Set the seed and the schedule. Returns True if graphs captured before are no longer valid."""
        self.state.seed.copy_(seed_tensor(seed, self.device))
        reallocated = False
        if schedule != self.schedule:
            reallocated = self._set_schedule(schedule)
            self.schedule = schedule
        self.tabulate()
        return reallocated

    @abstractmethod
    def _set_schedule(self, schedule: Any) -> bool:
        """Fill the schedule's tables. Returns True if one was reallocated."""

    def tabulate(self) -> None:
        """Recompute the model's table of levels, if it has one."""
        if self.precomputed.has_table:
            with self.precision():
                self.precomputed.tabulate(self.model)

    def precision(self) -> AbstractContextManager[None]:
        """Switch TF32 on or off, as the settings say, for the operations within."""
        return float32_products(self.device, self.settings.tf32)

    def slots(self, num_slots: int) -> Any:
        """Return the buffers for `num_slots` slots per lane."""
        if num_slots not in self._slots:
            with torch.inference_mode(False):  # normal tensors count the writes to them
                self._slots[num_slots] = self._allocate_slots(num_slots)
        return self._slots[num_slots]

    @abstractmethod
    def _allocate_slots(self, num_slots: int) -> SlotState: ...

    @abstractmethod
    def begin(
        self,
        num_lanes: int,
        num_slots: int,
        *,
        chooses: bool,
        initial: bool,
        whole: bool = False,
        noise: Tensor | None = None,
    ) -> None:
        """Activate patches, replace them by noise, and prepare the model.

        chooses: choose `size` of the `free` patches and write them to `mask`; else the mask is read.
        initial: draw the noise of the initial generation, not that of this iteration.
        whole: every patch of every chain is active, so that there is no context to compute.
        noise: (num_lanes, N, P), in place of random numbers.
        """

    @abstractmethod
    def tick(self, num_lanes: int, num_slots: int, noise: Tensor | None = None) -> Any:
        """Do one step: call the model and update the chains. Returns the model's prediction."""

    def waiting(self, values: Tensor, selection: Selection) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return values (B, N, ...) with the selected ones waiting for step 0, and what is `carried` then."""
        most_active = max(selection.counts.tolist())
        return values, tuple(each.new_zeros(len(values), most_active) for each in self.carried(most_active))

    def carried(self, num_slots: int) -> tuple[Tensor, ...]:
        """Return the slots' buffers (W, A) that a chain needs, beside its values, to go on after a step."""
        return ()

    num_signals: ClassVar[int]

    @abstractmethod
    def signals(self, num_slots: int) -> tuple[Tensor, ...]:
        """Return what the model told of the slots (W, A) float32, `num_signals` of them, where the settings ask for it.

        In the order of `ipr_fast.sampling.signals.Signals`, and after the last step.
        """

    def put_back(self, values: Tensor, step: Tensor, carried: tuple[Tensor, ...], num_slots: int) -> None:
        """Let the first lanes, which have begun, go on from values (n, N, ...) after the steps up to `step` (n,)."""
        self.state.values[: len(values)] = values
        self.state.step[: len(values)] = step
        for own, kept in zip(self.carried(num_slots), carried, strict=True):
            own[: len(values)] = kept

    def resume(self, num_lanes: int, num_slots: int) -> None:  # noqa: B027 - optional
        """Notice that the values of the first lanes, whose slots `begin` has listed, were replaced."""

    def mix_range(self, prediction: Any, num_slots: int) -> Tensor | None:
        """Return the smallest and largest variance mix of a prediction, (2,); None where it has none."""
        return None

    def choice(self, state: LaneState) -> PatchChoice:
        """Return the choice of active patches that `begin` makes on these lanes."""
        return PatchChoice(state.free, state.size, state.choice_iteration)

    def prepare(self, num_lanes: int, num_slots: int, whole: bool = False) -> None:
        """Let the model compute the context of the first lanes, if it has one."""
        if self.precomputed.has_context:
            with span("prepare"):
                self.precomputed.prepare(self.model, num_lanes, self.state, self.slots(num_slots), whole)
