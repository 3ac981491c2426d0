"""Generations of tokens: a state has some of its tokens revealed and the others masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.sampling.guidance.generation import Generation, States
from ipr_fast.sampling.tokens import TokenSampling


class TokenGeneration(Generation):
    """See `Generation`. known (B, N): the given tokens. The schedule reveals by "count" and does not remask."""

    def __init__(self, known: Tensor, mask_id: int, sampling: TokenSampling, **arguments: Any) -> None:
        super().__init__(sampling=sampling, **arguments)
        self.mask_id = mask_id
        self.start = States(known.masked_fill(self.free, mask_id)[None])
        visible = sampling.schedule.tables(self.free.shape[1]).visible
        assert visible is not None, "check_guidance refuses other schedules"
        self._visible = torch.nn.functional.pad(visible[self.counts].long(), (1, 0))  # (B, T + 1), after so many steps

    def before(self, done: Tensor, steps: int) -> Tensor:
        return (done - steps).clamp_min(0)

    def step_back(self, states: States, to: Tensor, iteration: int) -> States:
        """Mask random ones of the revealed tokens."""
        tokens = states.values
        left = self._visible.gather(1, to[:, None])[:, 0].to(tokens.device).repeat(len(tokens))
        seen = (self.free & (tokens != self.mask_id)).flatten(0, 1)
        size = (seen.sum(1) - left).clamp_min(0)
        choice = PatchChoice(seen, size, torch.full((), iteration, device=tokens.device))
        masked = choose_patches(choice, seed=self.seed, chain_ids=self.ids[: len(tokens)].flatten())
        return States(tokens.masked_fill(masked.view_as(tokens), self.mask_id))
