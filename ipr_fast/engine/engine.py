"""The engine: takes all chains of a call through the lanes, wave by wave.

From the first tick of a wave to the last, the host does not look at the data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import Plan, Wave, make_plan, slot_bucket, stages
from ipr_fast.sampling.condition import Condition
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.signals import Signals
from ipr_fast.sampling.tokens import TokenSampling
from ipr_fast.trace import span


class Engine:
    """The B chains of a call: copies of `values` (B, N, ...) in the lanes' type, and `chain_ids` (B,) int64.

    runner: runs them on its lanes; made for the same model and settings, on the device of the values. condition: the
    chains', in the layout of the settings.
    """

    def __init__(
        self,
        runner: Runner,
        values: Tensor,
        chain_ids: Tensor,
        sampling: Sampling | TokenSampling,
        condition: Condition | None = None,
    ) -> None:
        self.runner, self.sampling, self.chain_ids, self.condition = runner, sampling, chain_ids, condition
        self.values = values.to(runner.lanes.state.values.dtype, copy=True).contiguous()
        self.iteration = torch.zeros((), dtype=torch.int64, device=values.device)
        lanes, shape, device = runner.lanes, self.values.shape[:2], values.device
        self.signals = Signals.unknown(lanes.num_signals, shape, device) if lanes.settings.signals else None
        self._planned: tuple[Tensor, Plan] | None = None
        runner.start_call(sampling.seed, sampling.schedule)

    def begin(self, iteration: int) -> None:
        """Set the iteration of the next random numbers; 0 is the initial generation."""
        self.iteration.fill_(iteration)

    def notice_changes(self) -> None:
        """Capture again if user code changed the model."""
        self.runner.notice_changes()

    @property
    def mix_range(self) -> Tensor | None:
        """Smallest and largest variance mix of the first denoiser call, (2,)."""
        return self.runner.mix_range

    def num_steps(self, counts: Tensor) -> int:
        """Return the total number of steps of all waves of chains with `counts` (B,) active patches."""
        return self._plan(counts).steps

    @torch.inference_mode()
    def regenerate(
        self,
        selection: Selection,
        *,
        initial: bool = False,
        noise: Callable[[Tensor, int], Tensor] | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """Replace the selected patches by noise and denoise them, given the others.

        initial: use the noise of the initial generation.
        noise: noise(chains, step) -> (chains, N, P) in place of random numbers, without graphs; step -1 replaces the
            patches, chains are indices. on_step: called after each step.
        """
        plan = self._plan(selection.counts)
        begin = {"chooses": selection.choice is not None, "initial": initial or self.sampling.fixed_noise}
        for wave in plan.waves:
            chains = plan.order[wave.chains]
            whole = selection.is_whole and wave.least_active == self.values.shape[1]
            segments = self.runner.segments(wave, self._num_slots(plan, wave, selection.varies), whole=whole, **begin)
            self.runner.capture(segments)
            with span("enter"):
                self._enter(chains, wave, selection)
            self.runner.run(segments, None if noise is None else partial(noise, chains), on_step)
            with span("leave"):
                self._leave(chains, selection)
                self._note_signals(chains, segments[0][0].num_slots)

    def begin_slots(self, selection: Selection) -> tuple[Tensor, ...]:
        """Return what the slots of `resume` hold before the first step, and let the selected values wait for it."""
        self.values, slots = self.runner.lanes.waiting(self.values, selection)
        return slots

    @torch.inference_mode()
    def resume(
        self,
        selection: Selection,
        first: Tensor,
        steps: Tensor,
        slots: tuple[Tensor, ...] = (),
        *,
        initial: bool = True,
        on_share: Callable[[float], object] | None = None,
    ) -> None:
        """Go on with regenerations of the selected patches or positions of tokens, as `values` stand.

        first, steps: (B,) int64 on the CPU; the steps first .. first + steps - 1 are done, of a chain with 0 none.
        selection: a mask and its counts. slots: what the slots hold, see `Lanes.carried`: (B, A) each, A the largest
        count; updated. initial: patches that wait hold the noise of the initial generation, not of this iteration.
        on_share: called with the share of the work that a step was.
        """
        runner, lanes, most_active = self.runner, self.runner.lanes, max(selection.counts.tolist())
        plan = make_plan(steps, int, lanes.num_lanes, runner.lanes_for)
        order, step = plan.order.to(self.values.device), first.to(self.values.device) - 1
        on_step = None if on_share is None else partial(on_share, 1 / max(1, plan.steps))
        for wave in plan.waves:
            ids = plan.order[wave.chains]
            chains, parts = order[wave.chains], stages(steps[ids].tolist(), runner.lanes_for)
            whole = selection.is_whole and int(selection.counts[ids].min()) == self.values.shape[1]
            wave = wave._replace(phases=tuple(phase for _, phase in parts))
            segments = runner.segments(wave, most_active, chooses=False, initial=initial, whole=whole)
            runner.capture(segments)
            self._enter(chains, wave, selection)
            runner.run(segments[:1])  # lists the slots, and makes them noise or masks
            lanes.put_back(self.values[chains], step[chains], tuple(each[chains] for each in slots), most_active)
            lanes.resume(wave.lanes, most_active)
            still = [running for running, _ in parts[1:]]
            for (running, _), left, segment in zip(parts, [*still, 0], segments[1:], strict=True):
                runner.run([segment], on_step=on_step)
                done = slice(left, running)  # lanes may be more than the chains that run, and go on with these
                self.values.index_copy_(0, chains[done], lanes.state.values[done])
                for kept, now in zip(slots, lanes.carried(most_active), strict=True):
                    kept.index_copy_(0, chains[done], now[done])

    def _plan(self, counts: Tensor) -> Plan:
        """Return the plan for these counts, with its order on the device; the last plan is kept."""
        if self._planned is None or self._planned[0] is not counts:
            plan = make_plan(counts, self.sampling.num_steps, self.runner.lanes.num_lanes, self.runner.lanes_for)
            plan = plan._replace(order=plan.order.to(self.values.device, non_blocking=True))
            self._planned = counts, plan
        return self._planned[1]

    def _num_slots(self, plan: Plan, wave: Wave, varies: bool) -> int:
        """Return the slots of a wave: one number for all waves if the model computes every patch anyway."""
        narrow = self.runner.lanes.precomputed.has_context
        most_active = (wave if narrow else plan.waves[0]).most_active
        return slot_bucket(most_active, self.values.shape[1]) if varies else most_active

    def _enter(self, chains: Tensor, wave: Wave, selection: Selection) -> None:
        """Copy chains into the first lanes; the wave's other lanes idle."""
        number, state = len(chains), self.runner.lanes.state
        state.iteration.copy_(self.iteration)
        torch.index_select(self.values, 0, chains, out=state.values[:number])
        torch.index_select(self.chain_ids, 0, chains, out=state.chain_ids[:number])
        if self.condition is not None and state.condition is not None:
            self.condition.take(chains, out=state.condition)
        choice = selection.choice
        if choice is None:
            torch.index_select(selection.mask, 0, chains, out=state.mask[:number])
            state.mask[number : wave.lanes].zero_()
        else:
            torch.index_select(choice.free, 0, chains, out=state.free[:number])
            torch.index_select(choice.size, 0, chains, out=state.size[:number])
            state.size[number : wave.lanes].zero_()
            state.choice_iteration.copy_(choice.iteration)

    def _note_signals(self, chains: Tensor, num_slots: int) -> None:
        """Note what the model told of the patches that were active."""
        if self.signals is None:
            return
        lanes, number = self.runner.lanes, len(chains)
        active, mask = lanes.slots(num_slots).active[:number], lanes.state.mask[:number]
        for kept, told in zip(self.signals.present, lanes.signals(num_slots), strict=True):
            new = active.scatter(told[:number], mask.shape[1])
            kept.index_copy_(0, chains, torch.where(mask, new, kept[chains]))

    def _leave(self, chains: Tensor, selection: Selection) -> None:
        """Copy the chains back, and the masks that were chosen."""
        number, state = len(chains), self.runner.lanes.state
        self.values.index_copy_(0, chains, state.values[:number])
        if selection.choice is not None:
            selection.mask.index_copy_(0, chains, state.mask[:number])
