"""Lanes whose chains hold patches: an iteration renoises the active ones, a tick takes each one level further."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.engine.buffers import PatchSlots
from ipr_fast.engine.lanes import Lanes
from ipr_fast.engine.precomputed import guarded_call
from ipr_fast.kernels.advance import advance
from ipr_fast.kernels.denoise import denoise
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_RENOISE
from ipr_fast.kernels.renoise import Slots, renoise
from ipr_fast.kernels.slot_inputs import slot_inputs
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.condition import Layout
from ipr_fast.sampling.patches import waiting_slots
from ipr_fast.sampling.prediction import (
    LogitPrediction,
    Prediction,
    apart_from,
    as_taken,
    mix_range,
    preserves_variance,
)
from ipr_fast.sampling.schedule import Sampling, Schedule, ScheduleTables
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.signals import check_log_variance
from ipr_fast.trace import span


class PatchSettings(NamedTuple):
    """Arguments of a call that are constants in a captured graph."""

    stochasticity: float
    temperature: float
    tf32: bool = False
    condition: Layout | None = None
    signals: bool = False

    @classmethod
    def of(
        cls, sampling: Sampling, tf32: bool = False, condition: Layout | None = None, signals: bool = False
    ) -> PatchSettings:
        return cls(sampling.stochasticity, sampling.temperature, tf32, condition, signals)

    @property
    def schedule(self) -> Schedule:
        return Schedule(1)

    def sample_shape(self, model: Denoiser) -> tuple[int, int]:
        return model.grid.num_patches, 4 * model.grid.patch_numel

    def make_lanes(self, model: Denoiser, num_lanes: int, device: torch.device) -> PatchLanes:
        return PatchLanes(model, num_lanes, device, self)


class PatchLanes(Lanes):
    """Lanes for the chains of a Denoiser."""

    num_signals = 1

    def __init__(self, model: Denoiser, num_lanes: int, device: torch.device, settings: PatchSettings) -> None:
        shape = model.grid.num_patches, model.grid.patch_numel
        super().__init__(model, num_lanes, device, settings, shape, torch.float32)
        self.stochasticity, self.temperature = settings.stochasticity, settings.temperature
        self.preserving = preserves_variance(model)
        self.tables: ScheduleTables | None = None

    def _set_schedule(self, schedule: Schedule) -> bool:
        num_patches = self.model.grid.num_patches
        tables = schedule.tables(num_patches)
        if self.tables is None:
            self.tables = ScheduleTables(*(torch.empty_like(table, device=self.device) for table in tables))
        for own, new in zip(self.tables, tables, strict=True):
            own.copy_(new)
        return self.precomputed.has_table and self.precomputed.set_levels(schedule.levels(num_patches))

    def _allocate_slots(self, num_slots: int) -> PatchSlots:
        patches = self.model.grid.num_patches, self.model.grid.patch_numel
        dtype, signals = self.precomputed.slot_dtype, self.settings.signals
        return PatchSlots.allocate(self.num_lanes, num_slots, self.device, patches, dtype, signals)

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
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("renoise"):
            renoise(
                state.values,
                state.mask,
                Slots(slots.index, slots.count, slots.level, slots.start, state.step),
                seed=state.seed,
                stream=STREAM_INITIAL if initial else STREAM_RENOISE,
                iteration=state.origin if initial else state.iteration,
                chain_ids=state.chain_ids,
                choice=self.choice(state) if chooses else None,
                noise=noise,
            )
        self.resume(num_lanes, num_slots)
        self.prepare(num_lanes, num_slots, whole)

    def resume(self, num_lanes: int, num_slots: int) -> None:
        """Compute the inputs of a model that takes them, which `advance` and `denoise` then keep up."""
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        if slots.inputs is not None:
            dtype, levels = slots.inputs.values.dtype, self.precomputed.levels
            slot_inputs(state.values, slots.index, slots.level, levels, dtype, out=slots.inputs)

    def tick(self, num_lanes: int, num_slots: int, noise: Tensor | None = None) -> Prediction | LogitPrediction:
        """Do one step: denoiser call, schedule, posterior step of the moving patches. Returns the prediction.

        noise: (num_lanes, N, P), in place of random numbers.
        """
        assert self.tables is not None, "set_sampling comes first"
        prediction = self.predict(num_lanes, num_slots)
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        num_patches, numel = state.values.shape[1:]
        contract.prediction(prediction, (num_lanes, num_slots, numel), num_patches)
        prediction = apart_from(prediction, slots.written(state.values))
        (velocity, mix, log_variance), inputs = prediction, slots.inputs
        if slots.mean is not None:
            check_log_variance(self.model, log_variance)
        with span("advance"):
            advance(
                slots.start,
                slots.level,
                slots.previous_level,
                count=slots.count,
                step=state.step,
                log_variance=log_variance,
                row=None if inputs is None else inputs.row,
                levels=None if inputs is None else self.precomputed.levels,
                mean=slots.mean,
                **self.tables._asdict(),
            )
        with span("denoise"):
            denoise(
                state.values,
                index=slots.index,
                level=slots.previous_level,
                next_level=slots.level,
                velocity=velocity,
                variance_mix=mix,
                mix_is_logit=isinstance(prediction, LogitPrediction),
                preserving=self.preserving,
                slot_values=None if inputs is None else inputs.values,
                stochasticity=self.stochasticity,
                temperature=self.temperature,
                seed=state.seed,
                step=state.step,
                iteration=state.iteration,
                chain_ids=state.chain_ids,
                noise=noise,
            )
        return prediction

    def waiting(self, values: Tensor, selection: Selection) -> tuple[Tensor, tuple[Tensor, ...]]:
        return values, waiting_slots(selection.mask, max(selection.counts.tolist()))

    def carried(self, num_slots: int) -> tuple[Tensor, ...]:
        slots = self.slots(num_slots)
        return slots.level, slots.start

    def signals(self, num_slots: int) -> tuple[Tensor, ...]:
        mean = self.slots(num_slots).mean
        assert mean is not None, "the settings ask for signals"
        return (mean,)

    def put_back(self, values: Tensor, step: Tensor, carried: tuple[Tensor, ...], num_slots: int) -> None:
        """See `Lanes.put_back`; patches that wait keep the noise that the lanes have begun with."""
        active, (_, start) = self.slots(num_slots).active[: len(values)], carried
        waits = active.scatter((start < 0).float(), values.shape[1])[..., None] > 0
        super().put_back(torch.where(waits, self.state.values[: len(values)], values), step, carried, num_slots)

    def predict(self, num_lanes: int, num_slots: int) -> Prediction | LogitPrediction:
        """Call the denoiser."""
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        arguments, guarded = self.precomputed.arguments(num_lanes, state), {"levels": slots.level}
        if slots.inputs is not None:
            arguments["slots"] = slots.inputs
            guarded |= {f"slots.{name}": each for name, each in slots.inputs._asdict().items()}
        with span("network"), guarded_call(self.model, state, slots, **guarded):
            return self.model(as_taken(self.model, state.values), slots.level, slots.active, **arguments)

    def mix_range(self, prediction: Prediction | LogitPrediction, num_slots: int) -> Tensor | None:
        if isinstance(prediction, LogitPrediction):
            prediction = prediction.finished()
        occupied = self.slots(num_slots).active[: len(prediction.velocity)].occupied
        return mix_range(prediction.variance_mix, occupied)
