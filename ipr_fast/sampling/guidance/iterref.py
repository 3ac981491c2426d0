"""IterRef: Metropolis moves between the steps of a generation, each of which noises a state and denoises it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.accept import Kept, accept
from ipr_fast.sampling.guidance.generation import FIRST_ITERATION, Cost, Generation, States
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
    Of images, patches wait as noise in the place of masked tokens, and a move goes back to the start of a patch: by as
    many steps or, in the middle of a patch, a few more.

    reward: called as reward(x) with samples (M, ...), of some rows of some chains; returns (M,) real numbers, higher is
        better.
    temperature: >= 0; 0 takes what is as good or better.
    levels: in [0, 1), the shares of the steps that are still to do, to the nearest step; 0 refines finished samples.
        Where no step is done yet there is nothing to move; levels of one step have the moves of each.
    moves, noise_steps: >= 1.
    candidates: 1..moves, how many proposals are drawn at once, in further lanes. They are tried in order, each as a
        move; after an acceptance those left are dropped, since they were drawn from the state before. The law is the
        same for any number; more take fewer rounds and more model calls.

    `last` describes the last call that made samples with this object: a `Refinement`; None before.

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

    def stages(self, steps: int) -> int:
        return len(self.levels) * (1 + self.moves) + 1

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, ...)."""
        proposed, accepted = torch.zeros(2, generation.batch, dtype=torch.int64, device="cpu").unbind()
        state, done, stretch = generation.start, torch.zeros_like(generation.totals), 0
        for number, level in enumerate(self.levels):
            steps, iteration = generation.steps_at(level), FIRST_ITERATION + number * (self.moves + 2)
            state = generation.proceed(state, done, steps, stretch, stages=1)
            state = self._refine(generation, state, steps, iteration, proposed, accepted)
            done, stretch = steps, iteration + self.moves + 1
        state = generation.proceed(state, done, generation.totals, stretch, stages=1)
        self.last = Refinement(proposed, accepted, generation.cost)
        return generation.samples(state)[0]

    def _refine(
        self, generation: Generation, state: States, done: Tensor, iteration: int, proposed: Tensor, accepted: Tensor
    ) -> States:
        """Return states (1, B) after the moves at a level; add to `proposed` and `accepted` (B,)."""
        back = generation.before(done, self.noise_steps)
        left = torch.where(back < done, self.moves, 0)
        moving = (left > 0)[None]
        if not bool(moving.any()):
            generation.step_bar(self.moves)
        completed = generation.completions(state, done, iteration, moving)
        kept = Kept(state.values[0].clone(), generation.rewards(completed, moving)[0])
        order = torch.arange(self.candidates, device="cpu")[:, None]
        while bool(left.any()):
            iteration += 1
            asked = order < left
            states = generation.step_back(state.expand(self.candidates), back, iteration)
            states = generation.proceed(states, back, torch.where(asked, done, back), iteration)
            rewards = generation.rewards(generation.completions(states, done, iteration, asked), asked)
            state, outcome = self._try(generation, state, states, rewards, asked.to(rewards.device), kept)
            tried, moved = outcome.cpu()
            left -= tried
            proposed += tried
            accepted += moved
            generation.step_bar(float(tried.sum() / moving.sum()))
        return state

    def _try(
        self, generation: Generation, state: States, tried: States, rewards: Tensor, asked: Tensor, kept: Kept
    ) -> tuple[States, Tensor]:
        """Try candidates (C, B) in order up to the first acceptance; `kept` is updated.

        Returns the states (1, B) that chains go on from, and how many were tried and how many accepted: (2, B) int64.
        """
        temperature = torch.full((), self.temperature, dtype=torch.float64, device=rewards.device)
        number, moved = torch.zeros(2, generation.batch, dtype=torch.int64, device=rewards.device).unbind()
        accepted = torch.zeros(generation.batch, dtype=torch.bool, device=rewards.device)
        for row in range(self.candidates):
            trying = asked[row] & (moved == 0)
            candidate = tried.row(row)
            accept(
                candidate.values[0].clone(),
                torch.where(trying, rewards[row], torch.nan),  # which is never accepted
                kept=kept,
                accepted=accepted,
                temperature=temperature,
                iteration=generation.engine.iteration,
                chain_ids=generation.ids[row],
                seed=generation.seed,
            )
            state = candidate.where(accepted, state)
            number += trying
            moved += accepted
        return state, torch.stack([number, moved])


def level_list(levels: Sequence[float]) -> tuple[float, ...]:
    """Return levels in [0, 1), highest first. Raises ValueError for others, and for none or equal ones."""
    if not isinstance(levels, Sequence):
        raise ValueError(f"levels must be a sequence of numbers in [0, 1), got {levels!r}")
    try:
        found = [checks.number("levels", level, 0, math.nextafter(1, 0)) for level in levels]
    except ValueError as error:
        why = "; at level 1 nothing is generated yet" if any(level == 1 for level in levels) else ""
        raise ValueError(f"levels must be numbers in [0, 1), got {tuple(levels)}{why}") from error
    if not found or len(set(found)) < len(found):
        raise ValueError(f"levels must be distinct and at least one, got {tuple(levels)}")
    return tuple(sorted(found, reverse=True))
