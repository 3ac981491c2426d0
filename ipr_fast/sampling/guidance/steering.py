"""FK steering: particles of a generation that are resampled by the gain of their rewards (sequential Monte Carlo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.guidance.generation import FIRST_ITERATION, Cost, Generation, pick
from ipr_fast.sampling.guidance.iterref import level_list
from ipr_fast.sampling.rewards import Reward, callable_reward


class Steering:
    """Generate particles of each chain together and resample them at `levels`, by exp((r - r0) / temperature).

    r is the reward of a completion of the state, as for `IterRef`, and r0 that of the particle's ancestor at the level
    before ("difference" potentials), so the weights of a path multiply to exp(r(x) / temperature). Where r is -inf for
    all particles of a chain they are not resampled, and r0 stays.

    reward: called with samples (particles * B, ...). particles: >= 1. temperature: > 0. levels: in [0, 1); the last
        weighting, of finished samples, is always made. returns: "best", the particle of the highest reward; "draw", one
        drawn by the last weights, whose law tends to p(x) exp(r(x) / temperature) as particles grow in number.

    `last`: the `Cost` of the last call.
    Source: Singhal et al. 2025, "A general framework for inference-time scaling and steering of diffusion models".
    """

    def __init__(
        self,
        reward: Reward,
        temperature: float,
        particles: int = 4,
        levels: Sequence[float] = (0.75, 0.5, 0.25),
        returns: str = "best",
    ) -> None:
        self.reward, self.particles = callable_reward(reward), checks.integer("particles", particles, 1)
        self.temperature, self.levels = checks.number("temperature", temperature, 0), level_list(levels)
        if not self.temperature:
            raise ValueError("temperature must be a finite number > 0, got 0")
        if returns not in ("best", "draw"):
            raise ValueError(f"returns must be best or draw, got {returns!r}")
        self.returns = returns
        self.last: Cost | None = None

    @property
    def width(self) -> int:
        return self.particles

    def stages(self, steps: int) -> int:
        return len({*self.levels, 0.0})

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, ...)."""
        rows = generation.start.expand(self.particles)
        done, stretch = torch.zeros_like(generation.totals), 0
        before = torch.zeros(rows.values.shape[:2], dtype=torch.float64, device=rows.values.device)
        own = torch.arange(self.particles, device=before.device)[:, None]
        for number, level in enumerate((*(level for level in self.levels if level), 0.0)):
            iteration, steps = FIRST_ITERATION + 2 * number, generation.steps_at(level)
            rows = generation.proceed(rows, done, steps, stretch, stages=1)
            rewards = generation.rewards(generation.completions(rows, steps, iteration))
            gain = (rewards - before).nan_to_num(0.0, torch.inf, -torch.inf)  # 0 where a reward stays infinite
            done, stretch = steps, iteration + 1
            if level:
                lost = gain.isneginf().all(0)  # a chain without a particle to go on from keeps them all
                ancestors = torch.where(lost, own, generation.choose(gain, self.temperature, self.particles, iteration))
                rows, before = rows.pick(ancestors), torch.where(lost, before, pick(rewards, ancestors))
        self.last = generation.cost
        best = self.returns == "best"
        chosen = rewards.argmax(0, keepdim=True) if best else generation.choose(gain, self.temperature, 1, iteration)
        return generation.samples(rows.pick(chosen))[0]
