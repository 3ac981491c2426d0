"""SVDD: choose the best of several successors in every step of a generation."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.guidance.generation import FIRST_ITERATION, Cost, Generation
from ipr_fast.sampling.rewards import Reward, callable_reward


class SVDD:
    """Draw `candidates` successors of each chain's state after `every` steps, and go on from one of them.

    It is chosen with probability proportional to exp(r / temperature), where r is the reward of a completion of the
    state, as for `IterRef`; at temperature 0 it is the best one, of equals the first.

    reward: called with samples (M, ...), M <= candidates * B. candidates, every: >= 1. Where a patch takes
        several steps, its successors differ most after all of them.

    `last`: the `Cost` of the last call.
    Source: Li et al. 2024, "Derivative-free guidance in continuous and discrete diffusion models with soft value-based
    decoding" (SVDD), with the posterior's draw in place of a learned value.
    """

    def __init__(self, reward: Reward, temperature: float = 0.0, candidates: int = 4, every: int = 1) -> None:
        self.reward, self.candidates = callable_reward(reward), checks.integer("candidates", candidates, 1)
        self.temperature, self.every = checks.number("temperature", temperature, 0), checks.integer("every", every, 1)
        self.last: Cost | None = None

    @property
    def width(self) -> int:
        return self.candidates

    def stages(self, steps: int) -> int:
        return -(-steps // self.every)

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, ...)."""
        state, totals = generation.start, generation.totals
        for step in range(0, max(totals.tolist()), self.every):
            iteration = FIRST_ITERATION + step
            first, last = totals.clamp(max=step), totals.clamp(max=step + self.every)
            asked = (first < last).expand(self.candidates, -1)
            rows = generation.proceed(state.expand(self.candidates), first, last, iteration, stages=1)
            rewards = generation.rewards(generation.completions(rows, last, iteration, asked), asked)
            if self.temperature:
                chosen = generation.choose(rewards, self.temperature, 1, iteration)
            else:
                chosen = rewards.nan_to_num(-torch.inf).argmax(0, keepdim=True)
            state = rows.pick(chosen)
        self.last = generation.cost
        return generation.samples(state)[0]
