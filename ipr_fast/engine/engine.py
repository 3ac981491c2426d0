"""The engine: all chains of a call, taken through the lanes.

An iteration is: plan the waves; for each, take its chains into the lanes, regenerate them there, and put them back.
Between the first tick of a wave and the last nothing looks at the data from the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ipr_fast.engine.lanes import GivenNoise, Lanes, Settings, Start
from ipr_fast.engine.scheduler import Plan, Wave, make_plan, slot_bucket
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection
from ipr_fast.trace import span


class Engine:
    """B chains under one model and one way of sampling.

    patches (B, N, P) are copied to float32; chain_ids (B,) int64 name the chains' random numbers. Everything is on one
    device. lanes: where to run, made for this model and these settings; by default as many as chains, without graphs.
    """

    def __init__(
        self, model: Denoiser, patches: Tensor, chain_ids: Tensor, sampling: Sampling, lanes: Lanes | None = None
    ) -> None:
        device = patches.device
        if lanes is None:
            lanes = Lanes(model, max(1, len(patches)), device, Settings.of(sampling))
        self.lanes, self.sampling, self.chain_ids = lanes, sampling, chain_ids
        self.patches = patches.to(torch.float32, copy=True).contiguous()
        self.iteration = torch.zeros((), dtype=torch.int64, device=device)
        lanes.set_sampling(sampling.seed, sampling.schedule)
        self._planned: tuple[Tensor, Plan, Tensor] | None = None

    def begin(self, iteration: int) -> None:
        """Set the iteration that the next random numbers belong to; 0 is the initial generation."""
        self.iteration.fill_(iteration)

    def notice_changes(self) -> None:
        """Code of the user's has run, which may have changed the model."""
        self.lanes.notice_changes()

    @property
    def mix_range(self) -> Tensor | None:
        """The smallest and largest variance mix of the first call, a tensor (2,)."""
        return self.lanes.mix_range

    def num_steps(self, counts: Tensor) -> int:
        """The steps, one after another, of a regeneration of chains with these counts (B,) of active patches."""
        return self._plan(counts)[0].steps

    @torch.inference_mode()
    def regenerate(
        self,
        selection: Selection,
        *,
        initial: bool = False,
        noise: GivenNoise | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """Replace the selected patches by noise and denoise them, given the others.

        initial: draw the initial noise in place of an iteration's. noise: in place of the chains' own. on_step: called
        after each step.
        """
        plan, order = self._plan(selection.counts)
        start = Start(selection.choice is not None, initial or self.sampling.fixed_noise)
        for wave in plan.waves:
            chains, slots = order[wave.chains], self._slots(plan, wave, selection.varies)
            if noise is None:
                self.lanes.ready(wave, slots, start)
            with span("enter"):
                self._enter(chains, wave, selection)
            self.lanes.run(wave, slots, start, None if noise is None else noise.of(chains), on_step)
            with span("leave"):
                self._leave(chains, selection)

    def _enter(self, chains: Tensor, wave: Wave, selection: Selection) -> None:
        """Take chains into the lanes; what other lanes of the wave there are get nothing to do."""
        number, lanes = len(chains), self.lanes.state
        lanes.iteration.copy_(self.iteration)
        torch.index_select(self.patches, 0, chains, out=lanes.patches[:number])
        torch.index_select(self.chain_ids, 0, chains, out=lanes.chain_ids[:number])
        choice = selection.choice
        if choice is None:
            torch.index_select(selection.mask, 0, chains, out=lanes.mask[:number])
            lanes.mask[number : wave.lanes].zero_()
        else:
            torch.index_select(choice.free, 0, chains, out=lanes.free[:number])
            torch.index_select(choice.size, 0, chains, out=lanes.size[:number])
            lanes.size[number : wave.lanes].zero_()
            lanes.choice_iteration.copy_(choice.iteration)

    def _leave(self, chains: Tensor, selection: Selection) -> None:
        """Put the chains back where they came from."""
        number, lanes = len(chains), self.lanes.state
        self.patches.index_copy_(0, chains, lanes.patches[:number])
        if selection.choice is not None:
            selection.mask.index_copy_(0, chains, lanes.mask[:number])

    def _plan(self, counts: Tensor) -> tuple[Plan, Tensor]:
        """The plan for these counts, and its order on the device; the last one is kept."""
        if self._planned is None or self._planned[0] is not counts:
            plan = make_plan(counts, self.sampling.schedule, self.lanes.lanes, self.lanes.lanes_for)
            self._planned = counts, plan, plan.order.to(self.patches.device, non_blocking=True)
        return self._planned[1:]

    def _slots(self, plan: Plan, wave: Wave, varies: bool) -> int:
        """The slots of a wave. A model without `prepare` computes every patch anyway: there, those of all waves."""
        most_active = wave.most_active if self.lanes.prepares else plan.waves[0].most_active
        return slot_bucket(most_active, self.patches.shape[1]) if varies else most_active
