"""Lanes: a fixed number of places through which chains pass, and the work that is done on them.

Everything that the work reads or writes is a buffer made once, the seed and the counters too; a tick takes the first
lanes of the buffers. So `begin` (renoise, prepare) and `tick` can be captured for each number of lanes and of slots,
and replayed for other chains, seeds and schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.engine.buffers import LaneState, SlotState
from ipr_fast.engine.fingerprint import Fingerprint, fingerprint
from ipr_fast.engine.graphs import Capture, Graphs
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.scheduler import FewSizes, Run, Wave, one_by_one
from ipr_fast.kernels.advance import advance
from ipr_fast.kernels.denoise import denoise
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_RENOISE, seed_tensor
from ipr_fast.kernels.renoise import PatchChoice, Slots, renoise
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling import user_code
from ipr_fast.sampling.prediction import Prediction, mix_range
from ipr_fast.sampling.schedule import Sampling, Schedule, ScheduleTables
from ipr_fast.trace import span


class GivenNoise(NamedTuple):
    """Noise from elsewhere in place of the chains' own: what makes a run comparable with a recorded one.

    initial (B, N, P) replaces the active patches; posterior(step) gives (B, N, P) for each step.
    """

    initial: Tensor
    posterior: Callable[[int], Tensor]

    def of(self, chains: Tensor) -> GivenNoise:
        """The noise of some of the chains."""
        return GivenNoise(self.initial[chains], lambda step: self.posterior(step)[chains])


class Start(NamedTuple):
    """How a regeneration begins: whether it chooses its patches, and whether its noise is the initial one."""

    chooses: bool
    initial: bool


class Settings(NamedTuple):
    """What the captured work has as constants."""

    stochasticity: float
    temperature: float
    tf32: bool = False

    @classmethod
    def of(cls, sampling: Sampling, tf32: bool = False) -> Settings:
        """Those of a way of sampling."""
        return cls(sampling.stochasticity, sampling.temperature, tf32)


class Part(NamedTuple):
    """A piece of work that can be captured: the beginning if there is a `start`, and so many steps on so many lanes."""

    name: str
    slots: int
    start: Start | None
    runs: tuple[Run, ...]

    @property
    def steps(self) -> int:
        return sum(run.steps for run in self.runs)


class Lanes:
    """W lanes for the chains of one model.

    capture: how to make graphs; without, the work runs as it stands. whole_iterations: capture an iteration as one
    graph, in place of a tick.
    """

    def __init__(
        self,
        model: Denoiser,
        lanes: int,
        device: torch.device,
        settings: Settings,
        capture: Capture | None = None,
        whole_iterations: bool = False,
    ) -> None:
        self.model, self.lanes, self.settings, self.device = model, lanes, settings, device
        self.prepares, self.tabulates = contract.prepares(model), contract.tabulates(model)
        with torch.inference_mode(False):  # so that they count what is written to them
            self.state = LaneState.allocate(lanes, model.grid.num_patches, model.grid.patch_numel, device)
        self.tables: ScheduleTables | None = None
        self.graphs = None if capture is None else Graphs(capture)
        self.whole_iterations = whole_iterations
        self.seen: Fingerprint | None = None  # the model that graphs were captured of
        self._slots: dict[int, SlotState] = {}
        self._context: Any = None
        self._schedule: Schedule | None = None
        self._levels: Tensor | None = None
        self._table: Any = None
        self.notes_mix = True  # whether the next step notes the range (2,) of its variance mix: the first of a call
        self.mix_range: Tensor | None = None

    # -------------------------------------------------------------------------------------------- what others ask

    def lanes_for(self, chains: int) -> int:
        """The lanes on which so many chains run."""
        return self._at(one_by_one(chains) if self.graphs is None else FewSizes(self.lanes)(chains))

    @torch.inference_mode()
    def set_sampling(self, seed: int, schedule: Schedule) -> None:
        """The seed and the schedule of the chains to come; what depends on them alone is computed here."""
        self.state.seed.copy_(seed_tensor(seed, self.device))
        if schedule != self._schedule:
            num_patches = self.model.grid.num_patches
            tables = schedule.tables(num_patches)
            if self.tables is None:
                self.tables = ScheduleTables(*(torch.empty_like(table, device=self.device) for table in tables))
            for own, new in zip(self.tables, tables, strict=True):
                own.copy_(new)
            self._set_levels(schedule.levels(num_patches))
            self._schedule = schedule
        if self.tabulates:
            self._tabulate()
        self.notes_mix, self.mix_range = True, None

    def notice_changes(self) -> None:
        """Code of the user's has run: where it has changed the model, capture and tabulate anew."""
        if self.graphs is not None:
            now = fingerprint(self.model)
            if self.seen is None or not self.seen.equals(now):
                self.graphs.clear()
                self.seen = now
        if self._table is not None:
            self._tabulate()

    def ready(self, wave: Wave, slots: int, start: Start) -> None:
        """Capture what the wave needs and is not captured yet. What is in the lanes is lost then."""
        if self.graphs is None:
            return
        parts = [part for part, _ in self._parts(wave, slots, start) if not self.graphs.touch(part)]
        if not parts:
            return
        for buffer in (self.state.patches, self.state.mask, self.state.free, self.state.size):
            buffer.zero_()  # neutral: nothing is chosen, no slot is taken, nothing moves
        notes_mix, self.notes_mix = self.notes_mix, False  # a graph is of a later step
        with self._precision():
            for part in parts:  # most lanes first
                self.graphs.add(part, f"{part.name} of {checks.name_of(self.model)}", partial(self._work, part))
        self.notes_mix = notes_mix
        self.seen = fingerprint(self.model)  # after what the calls themselves have changed, such as a counter

    def run(
        self,
        wave: Wave,
        slots: int,
        start: Start,
        noise: GivenNoise | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """Regenerate the chains in the lanes. Given noise is used as it stands, without graphs."""
        if noise is not None:
            with self._precision():
                self._run_with(noise, wave, slots, start, on_step)
            return
        with self._precision() if self.graphs is None else nullcontext():
            for part, times in self._parts(wave, slots, start):
                for _ in range(times):
                    with span(part.name):
                        self._do(part)
                    for _ in range(part.steps if on_step is not None else 0):
                        on_step()

    # -------------------------------------------------------------------------------------------- the work

    def _parts(self, wave: Wave, slots: int, start: Start) -> Iterator[tuple[Part, int]]:
        """The work of a wave and how many times in a row to do it, most lanes first."""
        if self.whole_iterations:
            yield Part("iteration", slots, start, wave.runs), 1
            return
        yield Part("begin", slots, start, (Run(wave.lanes, 0),)), 1
        for lanes, steps in wave.runs:
            yield Part("tick", slots, None, (Run(lanes, 1),)), steps

    def _do(self, part: Part) -> None:
        """A replay, or the work as it stands: without graphs, and for the first step, whose prediction is looked at."""
        if self.graphs is not None and not (self.notes_mix and part.steps):
            self.graphs.replay(part)
        elif self.graphs is not None:
            with self._precision():
                self._work(part)
            self.seen = fingerprint(self.model)  # after what the call itself has changed, such as a counter
        else:
            self._work(part)

    def _work(self, part: Part) -> None:
        if part.start is not None:
            self.begin(part.runs[0].lanes, part.slots, part.start)
        for lanes, steps in part.runs:
            for _ in range(steps):
                self.tick(lanes, part.slots)

    def _run_with(
        self, noise: GivenNoise, wave: Wave, slots: int, start: Start, on_step: Callable[[], object] | None
    ) -> None:
        step = 0
        self.begin(wave.lanes, slots, start, self._padded(noise.initial, wave.lanes))
        for lanes, steps in wave.runs:
            for _ in range(steps):
                self.tick(lanes, slots, self._padded(noise.posterior(step), lanes))
                step += 1
                if on_step is not None:
                    on_step()

    def _padded(self, noise: Tensor, lanes: int) -> Tensor:
        """Noise of the chains (n, N, P) as that of so many lanes."""
        return torch.cat([noise[:lanes], noise.new_zeros(max(0, lanes - len(noise)), *noise.shape[1:])])

    def _precision(self) -> AbstractContextManager[None]:
        return float32_products(self.device, self.settings.tf32)

    def begin(self, lanes: int, slots: int, start: Start, noise: Tensor | None = None) -> None:
        """Make the patches of the mask, or the chosen ones, active, replace them by noise, and prepare the model."""
        state, into = self.state.first(lanes), self.slots(slots).first(lanes)
        with span("renoise"):
            renoise(
                state.patches,
                state.mask,
                Slots(into.index, into.count, into.level, into.start),
                seed=state.seed,
                stream=STREAM_INITIAL if start.initial else STREAM_RENOISE,
                iteration=state.origin if start.initial else state.iteration,
                chain_ids=state.chain_ids,
                choice=PatchChoice(state.free, state.size, state.choice_iteration) if start.chooses else None,
                noise=noise,
            )
        state.step.zero_()
        if self.prepares:
            with span("prepare"):
                self._prepare(lanes, slots)

    def tick(self, lanes: int, slots: int, noise: Tensor | None = None) -> None:
        """One step: a denoiser call, the schedule, the update of the moving patches; `noise` (lanes, N, P) if given."""
        prediction, settings = self.predict(lanes, slots), self.settings
        lanes = self._at(lanes)
        state, into = self.state.first(lanes), self.slots(slots).first(lanes)
        contract.prediction(prediction, (*into.level.shape, state.patches.shape[-1]))
        if self.notes_mix:
            self.notes_mix, self.mix_range = False, mix_range(prediction.variance_mix, into.active.occupied)
        with span("advance"):
            advance(
                into.start,
                into.next_level,
                count=into.count,
                step=state.step,
                log_variance=prediction.log_variance,
                **self.tables._asdict(),
            )
        with span("denoise"):
            denoise(
                state.patches,
                index=into.index,
                level=into.level,
                next_level=into.next_level,
                velocity=prediction.velocity,
                variance_mix=prediction.variance_mix,
                stochasticity=settings.stochasticity,
                temperature=settings.temperature,
                seed=state.seed,
                step=state.step,
                iteration=state.iteration,
                chain_ids=state.chain_ids,
                noise=noise,
            )
        into.level.copy_(into.next_level)
        state.step.add_(1)

    def predict(self, lanes: int, slots: int) -> Prediction:
        """The denoiser call of a tick."""
        lanes = self._at(lanes)
        state, into = self.state.first(lanes), self.slots(slots).first(lanes)
        with span("network"), self._model_call(state.patches, into, levels=into.level):
            return self.model(state.patches, into.level, into.active, **self.prepared(lanes))

    def _model_call(self, patches: Tensor, slots: SlotState, **more: Tensor) -> AbstractContextManager[None]:
        inputs = {"patches": patches, "active.index": slots.index, "active.count": slots.count, **more}
        return user_code.model_call(self.model, **inputs)

    def prepared(self, lanes: int) -> dict[str, Any]:
        """What the model has made before and is given back in each call: the context of these lanes, and the table."""
        context = {} if self._context is None else {"context": self._context_of(self._at(lanes))}
        return context | self._tabulated()

    def slots(self, slots: int) -> SlotState:
        """The buffers for so many slots a lane."""
        if slots not in self._slots:
            with torch.inference_mode(False):  # so that they count what is written to them
                self._slots[slots] = SlotState.allocate(self.lanes, slots, self.device)
        return self._slots[slots]

    def _set_levels(self, levels: Tensor) -> None:
        """The levels of a table, the last one repeated, so that few sizes serve all schedules."""
        before = 0 if self._levels is None else len(self._levels)
        size = max(16, before, 1 << (len(levels) - 1).bit_length())
        with torch.inference_mode(False):  # so that they count what is written to them
            self._levels = torch.cat([levels, levels[-1:].expand(size - len(levels))]).to(self.device)
        if size > before:
            self._table = None
            if self.graphs is not None:
                self.graphs.clear()  # they read a smaller one

    @torch.inference_mode()
    def _tabulate(self) -> None:
        """What the model makes of each level, in a table that graphs go on reading for other schedules and weights."""
        with self._precision(), user_code.model_call(self.model, levels=self._levels):
            table = self.model.tabulate(self._levels, out=self._table)
        if self._table is not None and table is not self._table:
            raise TypeError("model: tabulate must overwrite and return the table that it is given as `out`")
        self._table = table

    def _tabulated(self) -> dict[str, Any]:
        return {} if self._table is None else {"table": self._table}

    def _prepare(self, lanes: int, slots: int) -> None:
        """What the model computes once an iteration, in a context that is made once, for all lanes."""
        if self._context is None:
            with self._model_call(self.state.patches, self.slots(slots)):
                self._context = self.model.prepare(self.state.patches, self.slots(slots).active, **self._tabulated())
            if self._context is None:
                raise TypeError("model: prepare must return a context, got None")
            if self._at(lanes) == self.lanes:
                return
        lanes = self._at(lanes)
        out = self._context_of(lanes)
        state, into = self.state.first(lanes), self.slots(slots).first(lanes)
        with self._model_call(state.patches, into):
            context = self.model.prepare(state.patches, into.active, out=out, **self._tabulated())
        if context is out:
            return
        if self.graphs is not None or lanes < self.lanes:
            raise TypeError("model: prepare must overwrite and return the context that it is given as `out`")
        self._context = context

    def _at(self, lanes: int) -> int:
        """The lanes on which to work for these: all, where a context cannot be had for fewer."""
        return lanes if self._context is None or hasattr(self._context, "first") else self.lanes

    def _context_of(self, lanes: int) -> Any:
        return self._context if lanes == self.lanes else self._context.first(lanes)
