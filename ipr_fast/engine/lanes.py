"""The lanes: places for a fixed number of chains, with the two operations of an iteration, `begin` and `tick`.

Both work on the first lanes of buffers that are allocated once, the seed and the counters included. So a CUDA graph of
either one, captured for a number of lanes and slots, can be replayed for other chains, seeds and schedules.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.engine.buffers import LaneState, SlotState
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.precomputed import Precomputed, guarded_call
from ipr_fast.kernels.advance import advance
from ipr_fast.kernels.denoise import denoise
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_RENOISE, seed_tensor
from ipr_fast.kernels.renoise import PatchChoice, Slots, renoise
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Sampling, Schedule, ScheduleTables
from ipr_fast.trace import span


class Settings(NamedTuple):
    """Arguments of a call that are constants in a captured graph."""

    stochasticity: float
    temperature: float
    tf32: bool = False

    @classmethod
    def of(cls, sampling: Sampling, tf32: bool = False) -> Settings:
        return cls(sampling.stochasticity, sampling.temperature, tf32)


class Lanes:
    """Lanes for the chains of one model."""

    def __init__(self, model: Denoiser, num_lanes: int, device: torch.device, settings: Settings) -> None:
        self.model, self.num_lanes, self.device, self.settings = model, num_lanes, device, settings
        self.precomputed = Precomputed(model, num_lanes, device)
        with torch.inference_mode(False):  # normal tensors count the writes to them
            self.state = LaneState.allocate(num_lanes, model.grid.num_patches, model.grid.patch_numel, device)
        self.tables: ScheduleTables | None = None
        self._schedule: Schedule | None = None
        self._slots: dict[int, SlotState] = {}

    @torch.inference_mode()
    def set_sampling(self, seed: int, schedule: Schedule) -> bool:
        """Set the seed and the schedule. Returns True if graphs captured before are no longer valid."""
        self.state.seed.copy_(seed_tensor(seed, self.device))
        reallocated = False
        if schedule != self._schedule:
            num_patches = self.model.grid.num_patches
            tables = schedule.tables(num_patches)
            if self.tables is None:
                self.tables = ScheduleTables(*(torch.empty_like(table, device=self.device) for table in tables))
            for own, new in zip(self.tables, tables, strict=True):
                own.copy_(new)
            if self.precomputed.has_table:
                reallocated = self.precomputed.set_levels(schedule.levels(num_patches))
            self._schedule = schedule
        self.tabulate()
        return reallocated

    def tabulate(self) -> None:
        """Recompute the model's table of levels, if it has one."""
        if self.precomputed.has_table:
            with self.precision():
                self.precomputed.tabulate(self.model)

    def precision(self) -> AbstractContextManager[None]:
        """Switch TF32 on or off, as the settings say, for the operations within."""
        return float32_products(self.device, self.settings.tf32)

    def slots(self, num_slots: int) -> SlotState:
        """Return the buffers for `num_slots` slots per lane."""
        if num_slots not in self._slots:
            with torch.inference_mode(False):  # normal tensors count the writes to them
                self._slots[num_slots] = SlotState.allocate(self.num_lanes, num_slots, self.device)
        return self._slots[num_slots]

    def begin(
        self, num_lanes: int, num_slots: int, *, chooses: bool, initial: bool, noise: Tensor | None = None
    ) -> None:
        """Activate patches, replace them by noise, and prepare the model.

        chooses: choose `size` of the `free` patches and write them to `mask`; else the mask is read.
        initial: draw the noise of the initial generation, not that of this iteration.
        noise: (num_lanes, N, P), in place of random numbers.
        """
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("renoise"):
            renoise(
                state.patches,
                state.mask,
                Slots(slots.index, slots.count, slots.level, slots.start, state.step),
                seed=state.seed,
                stream=STREAM_INITIAL if initial else STREAM_RENOISE,
                iteration=state.origin if initial else state.iteration,
                chain_ids=state.chain_ids,
                choice=PatchChoice(state.free, state.size, state.choice_iteration) if chooses else None,
                noise=noise,
            )
        if self.precomputed.has_context:
            with span("prepare"):
                self.precomputed.prepare(self.model, num_lanes, self.state, self.slots(num_slots))

    def tick(self, num_lanes: int, num_slots: int, noise: Tensor | None = None) -> Prediction:
        """Do one step: denoiser call, schedule, posterior step of the moving patches. Returns the prediction.

        noise: (num_lanes, N, P), in place of random numbers.
        """
        assert self.tables is not None, "set_sampling comes first"
        prediction = self.predict(num_lanes, num_slots)
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        contract.prediction(prediction, (num_lanes, num_slots, state.patches.shape[-1]))
        with span("advance"):
            advance(
                slots.start,
                slots.level,
                slots.previous_level,
                count=slots.count,
                step=state.step,
                log_variance=prediction.log_variance,
                **self.tables._asdict(),
            )
        with span("denoise"):
            denoise(
                state.patches,
                index=slots.index,
                level=slots.previous_level,
                next_level=slots.level,
                velocity=prediction.velocity,
                variance_mix=prediction.variance_mix,
                stochasticity=self.settings.stochasticity,
                temperature=self.settings.temperature,
                seed=state.seed,
                step=state.step,
                iteration=state.iteration,
                chain_ids=state.chain_ids,
                noise=noise,
            )
        return prediction

    def predict(self, num_lanes: int, num_slots: int) -> Prediction:
        """Call the denoiser."""
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("network"), guarded_call(self.model, state, slots, levels=slots.level):
            return self.model(state.patches, slots.level, slots.active, **self.precomputed.arguments(num_lanes))
