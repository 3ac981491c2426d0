"""Best of N: generate N samples, return the one of the highest reward."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.guidance.generation import Cost, Generation
from ipr_fast.sampling.rewards import Reward, callable_reward


class BestOfN:
    """Return the best of n independent samples of each chain; of equals the first.

    reward: called with samples (n * B, ...). n: >= 1; the first sample is that of a generation without guidance.

    `last`: the `Cost` of the last call.
    """

    def __init__(self, reward: Reward, n: int) -> None:
        self.reward, self.n = callable_reward(reward), checks.integer("n", n, 1)
        self.last: Cost | None = None

    @property
    def width(self) -> int:
        return self.n

    def stages(self, steps: int) -> int:
        return self.n

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, ...)."""
        rows = generation.start.expand(self.n)
        rows = generation.proceed(
            rows, torch.zeros_like(generation.totals), generation.totals, 0, stages=self.stages(0)
        )
        best = generation.rewards(rows).argmax(0, keepdim=True)
        self.last = generation.cost
        return generation.samples(rows.pick(best))[0]
