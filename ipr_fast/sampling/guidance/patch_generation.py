"""Generations of patches: a state has some of its patches finished, some on their way, and others that wait as noise.

The noise of patches that wait is no part of a state: every stretch of steps draws it anew in its own iteration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.sampling.guidance.generation import Generation, States
from ipr_fast.sampling.patches import ActivePatches, waiting_slots
from ipr_fast.sampling.schedule import Sampling


class PatchGeneration(Generation):
    """See `Generation`. known (B, N, P): the given patches. A state's slots are its levels and starts (W, B, A)."""

    def __init__(self, known: Tensor, sampling: Sampling, **arguments: Any) -> None:
        super().__init__(sampling=sampling, **arguments)
        self.active = ActivePatches.from_mask(self.free, max(self.counts.tolist()))
        level, start = waiting_slots(self.free, max(self.counts.tolist()))
        self.start = States(known[None], (level[None], start[None]))
        tables = sampling.schedule.tables(self.free.shape[1])
        self._starts, self._block = tables.starts[self.counts].long(), tables.block[self.counts].long()

    def before(self, done: Tensor, steps: int) -> Tensor:
        """See `Generation.before`: back to a step at which a patch starts, and all that had started are finished.

        Patches on their way are noised with those chosen, so at least as many steps are taken back as they have done. A
        step so early that the schedule can have finished no patch becomes the first one.
        """
        starts, block, done_ = self._starts, self._block[:, None], done[:, None]
        started = starts < done_
        unfinished = started & (starts + block > done_) & (done_ < self.totals[:, None])
        latest = starts.masked_fill(~started, 0).max(1).values  # it is taken back
        earliest = starts.masked_fill(~unfinished, NEVER).min(1).values
        back = (done - steps).minimum(latest).minimum(earliest).clamp_min(0)
        back = starts.masked_fill(starts > back[:, None], 0).max(1).values
        return torch.where(back + 1 < self._block, 0, back).minimum(done)

    def step_back(self, states: States, to: Tensor, iteration: int) -> States:
        """Let all patches wait but random ones of the finished, as many as have started after `to` steps."""
        level, start = states.slots
        rows, places = level.shape[:2].numel(), self.free.shape[1]
        active = ActivePatches(self.active.index.repeat(len(level), 1), self.active.count.repeat(len(level)))
        clean = active.scatter((level.flatten(0, 1) == 0).float(), places) * self.free.repeat(len(level), 1) > 0
        kept = (self._starts < to[:, None]).sum(1).to(clean.device).repeat(len(level))
        choice = PatchChoice(clean, kept, torch.full((), iteration, device=clean.device))
        chosen = choose_patches(choice, seed=self.seed, chain_ids=self.ids[: len(level)].flatten())
        keeps = active.gather(chosen[..., None].float())[..., 0].view(rows, -1) * active.occupied > 0
        slots = (active.occupied & ~keeps).to(level.dtype), torch.where(keeps, 0, -1).to(start.dtype)
        return States(states.values, tuple(each.view_as(level) for each in slots))


NEVER = 2**31 - 1
