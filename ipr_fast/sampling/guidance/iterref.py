"""IterRef: Metropolis moves between the steps of a generation, each of which noises a state and denoises it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.accept import Kept, accept
from ipr_fast.sampling.guidance.generation import FIRST_ITERATION, Cost, Generation
from ipr_fast.sampling.rewards import Reward, callable_reward


class Refinement(NamedTuple):
    """What the chains (B,) of a call did: int64, on the CPU, as is their cost.

    proposed: moves; accepted: those of them that were accepted.
    """

    proposed: Tensor
    accepted: Tensor
    cost: Cost


class IterRef:
    """Refine the states of a generation toward a reward, where they stand, before the generation goes on.

    At each of `levels` a chain makes so many `moves`: mask revealed tokens as if `noise_steps` steps of its schedule
    had not been done, do these steps again, and accept the new state with probability
    min(1, exp((r' - r) / temperature)), else keep the old one. The reward of a state is that of a completion of it: all
    masked tokens drawn at once, by one call of the model. A completion belongs to its state and is never drawn again.

    reward: called as reward(x) with samples (M, N), of some rows of some chains; returns (M,) real numbers, higher is
        better.
    temperature: >= 0; 0 takes what is as good or better.
    levels: in [0, 1), the shares of the steps that are still to do; 0 refines finished samples.
    moves, noise_steps: >= 1.
    candidates: how many proposals are drawn at once, in further lanes. They are tried in order, each as a move; after
        an acceptance those left are dropped, since they were drawn from the state before. The law is the same for any
        number; more take fewer rounds and more model calls.

    `last` describes the last call in which this object was used: a `Refinement`.

    If the schedule reveals one token a step in an order "random" and the model's conditionals are consistent, a state
    keeps the law p_t(x) E[exp(r(completion) / temperature) | x], where p_t is the model's law of states at that level:
    the law p(x) exp(r(x) / temperature) at level 0. Every move is a fresh candidate and their number is fixed: trying a
    rejected candidate again, or stopping at the first acceptance, would change the law.
    Source: Lee et al. 2025, "Effective Test-Time Scaling of Discrete Diffusion through Iterative Refinement" (IterRef).
    Its multiple-try weights are constant, which makes it Metropolis-Hastings with this proposal.
    """

    def __init__(
        self,
        reward: Reward,
        temperature: float = 0.0,
        levels: Sequence[float] = (0.75, 0.5, 0.25, 0.0),
        moves: int = 4,
        noise_steps: int = 1,
        candidates: int = 1,
    ) -> None:
        self.reward = callable_reward(reward)
        self.temperature = checks.number("temperature", temperature, 0)
        self.levels = level_list(levels)
        self.moves = checks.integer("moves", moves, 1)
        self.noise_steps = checks.integer("noise_steps", noise_steps, 1)
        self.candidates = checks.integer("candidates", candidates, 1, self.moves)
        self.last: Refinement | None = None

    @property
    def width(self) -> int:
        return self.candidates

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, N)."""
        proposed, accepted = torch.zeros(2, generation.batch, dtype=torch.int64, device="cpu").unbind()
        tokens, done = generation.start, torch.zeros_like(generation.totals)
        for number, level in enumerate(self.levels):
            steps = generation.steps_at(level)
            tokens = generation.proceed(tokens[None], done, steps, 0)[0]
            tokens = self._refine(generation, tokens, steps, number, proposed, accepted)
            done = steps
        tokens = generation.proceed(tokens[None], done, generation.totals, 0)[0]
        self.last = Refinement(proposed, accepted, generation.cost)
        return tokens

    def _refine(
        self, generation: Generation, tokens: Tensor, done: Tensor, number: int, proposed: Tensor, accepted: Tensor
    ) -> Tensor:
        """Return states (B, N) after the moves at the level of this number; add to `proposed` and `accepted`."""
        iteration = FIRST_ITERATION + number * (self.moves + 1)
        back = (done - self.noise_steps).clamp_min(0)
        left = torch.where(back < done, self.moves, 0)
        moving = (left > 0)[None]
        completed = generation.completions(tokens[None], done, iteration, moving)
        kept = Kept(tokens.clone(), generation.rewards(completed, moving)[0])
        order = torch.arange(self.candidates, device="cpu")[:, None]
        while bool(left.any()):
            iteration += 1
            asked = order < left
            states = generation.step_back(kept.values.expand(self.candidates, -1, -1), back, iteration)
            states = generation.proceed(states, back, torch.where(asked, done, back), iteration)
            rewards = generation.rewards(generation.completions(states, done, iteration, asked), asked)
            tried, moved = self._try(generation, states, rewards, asked.to(states.device), kept).cpu()
            left -= tried
            proposed += tried
            accepted += moved
        return kept.values

    def _try(self, generation: Generation, states: Tensor, rewards: Tensor, asked: Tensor, kept: Kept) -> Tensor:
        """Try candidates (C, B, N) in order up to the first acceptance.

        Returns how many were tried and how many accepted, (2, B) int64; `kept` is updated.
        """
        temperature = torch.full((), self.temperature, dtype=torch.float64, device=states.device)
        tried, moved = torch.zeros(2, generation.batch, dtype=torch.int64, device=states.device).unbind()
        accepted = torch.zeros(generation.batch, dtype=torch.bool, device=states.device)
        for row, state in enumerate(states):
            trying = asked[row] & (moved == 0)
            accept(
                state,
                torch.where(trying, rewards[row], torch.nan),  # which is never accepted
                kept=kept,
                accepted=accepted,
                temperature=temperature,
                iteration=generation.engine.iteration,
                chain_ids=generation.ids[row],
                seed=generation.seed,
            )
            tried += trying
            moved += accepted
        return torch.stack([tried, moved])


def level_list(levels: Sequence[float]) -> tuple[float, ...]:
    """Return levels in [0, 1), highest first. Raises ValueError for others, and for none or equal ones."""
    found = [checks.number("levels", level, 0, 1) for level in levels]
    if not found or max(found) == 1 or len(set(found)) < len(found):
        raise ValueError(f"levels must be distinct numbers in [0, 1), got {tuple(levels)}")
    return tuple(sorted(found, reverse=True))
