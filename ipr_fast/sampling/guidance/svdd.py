"""SVDD: choose the best of several successors in every step of a generation."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.guidance.generation import FIRST_ITERATION, Cost, Generation, pick
from ipr_fast.sampling.rewards import Reward, callable_reward


class SVDD:
    """Draw `candidates` successors of each chain's state in every step, and go on from one of them.

    It is chosen with probability proportional to exp(r / temperature), where r is the reward of a completion of the
    state, as for `IterRef`; at temperature 0 it is the best one, of equals the first.

    reward: called with samples (M, N), M <= candidates * B. candidates: >= 1.

    `last`: the `Cost` of the last call.
    Source: Li et al. 2024, "Derivative-free guidance in continuous and discrete diffusion models with soft value-based
    decoding" (SVDD), with the posterior's draw in place of a learned value.
    """

    def __init__(self, reward: Reward, temperature: float = 0.0, candidates: int = 4) -> None:
        self.reward, self.candidates = callable_reward(reward), checks.integer("candidates", candidates, 1)
        self.temperature = checks.number("temperature", temperature, 0)
        self.last: Cost | None = None

    @property
    def width(self) -> int:
        return self.candidates

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, N)."""
        tokens, totals = generation.start, generation.totals
        for step in range(max(totals.tolist())):
            iteration = FIRST_ITERATION + step
            first, last = totals.clamp(max=step), totals.clamp(max=step + 1)
            asked = (first < last).expand(self.candidates, -1)
            rows = generation.proceed(tokens.expand(self.candidates, -1, -1), first, last, iteration)
            rewards = generation.rewards(generation.completions(rows, last, iteration, asked), asked)
            if self.temperature:
                chosen = generation.choose(rewards / self.temperature, 1, iteration)
            else:
                chosen = rewards.nan_to_num(-torch.inf).argmax(0, keepdim=True)
            tokens = pick(rows, chosen)[0]
        self.last = generation.cost
        return tokens
