"""A generation that stops between two steps, steps back, branches and goes on: what guidance is made of.

Each of B chains has `width` rows, which run together in the engine's lanes. Row w of chain i draws its random numbers
as chain i + w floor(2^32 / width), so row 0 is the chain of a generation without guidance. Its steps before the first
branch draw in iteration 0; every later stretch of steps, move, completion or choice draws in an iteration of its own
from `FIRST_ITERATION` on, far beyond those of refinement. So candidates are fresh, and no chain depends on its batch.

`TokenGeneration` and `PatchGeneration` know what a state is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.accept import log_uniforms
from ipr_fast.kernels.philox import MAX_CHAIN_ID, seed_tensor
from ipr_fast.sampling.rewards import Reward, check_nan, rewards_of
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.tokens import TokenSampling, TokenSchedule

FIRST_ITERATION = 1 << 31


class Cost(NamedTuple):
    """What each chain of a call has cost: (B,) int64 on the CPU.

    model_calls: steps of its rows, those of candidates that were dropped included. reward_calls: samples that the
    reward was asked about.
    """

    model_calls: Tensor
    reward_calls: Tensor


class States(NamedTuple):
    """States of a generation, (W, B) of them.

    values (W, B, N, ...): tokens or patches. slots: what else the engine needs to go on, (W, B, A) each, see
    `Lanes.carried`.
    """

    values: Tensor
    slots: tuple[Tensor, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        return States(function(self.values), tuple(function(each) for each in self.slots))

    def row(self, number: int) -> States:
        """Return one row as states (1, B)."""
        return self.map(lambda each: each[number : number + 1])

    def expand(self, width: int) -> States:
        """Repeat one row (1, B)."""
        return self.map(lambda each: each.expand(width, *each.shape[1:]))

    def pick(self, chosen: Tensor) -> States:
        """Return the chosen rows (R, B)."""
        return self.map(lambda each: pick(each, chosen))

    def where(self, taken: Tensor, others: States) -> States:
        """Return these states where `taken` (B,), the others elsewhere."""
        pairs = zip((self.values, *self.slots), (others.values, *others.slots), strict=True)
        values, *slots = (torch.where(taken.view(1, -1, *(1,) * (a.ndim - 2)), a, b) for a, b in pairs)
        return States(values, tuple(slots))


class Guidance(Protocol):
    """A method that generates samples toward a reward."""

    reward: Reward

    @property
    def width(self) -> int:
        """How many rows a chain has at most."""
        ...

    def stages(self, steps: int) -> int:
        """Return the length of the progress bar for a generation of so many steps."""
        ...

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, ...)."""
        ...


class PartEngine(Protocol):
    """The engine's part of a generation: see `ipr_fast.engine.engine.Engine`."""

    values: Tensor
    iteration: Tensor

    @property
    def mix_range(self) -> Tensor | None: ...

    def begin(self, iteration: int) -> None: ...

    def resume(
        self,
        selection: Selection,
        first: Tensor,
        steps: Tensor,
        slots: tuple[Tensor, ...] = (),
        *,
        initial: bool = True,
        on_share: Callable[[float], object] | None = None,
    ) -> None: ...


def check_guidance(guidance: object, schedule: object) -> None:
    """Raise ValueError for what is no guidance, and for schedules that it cannot be applied to."""
    if not all(hasattr(guidance, name) for name in ("generate", "stages")) or isinstance(guidance, type):
        name = checks.instance_or_class(guidance)
        raise ValueError(f"guidance must be an object such as ipr_fast.IterRef(reward, ...), got {name}")
    missing = [f"`{name}`" for name in ("width", "reward") if not hasattr(guidance, name)]
    if missing:
        raise ValueError(f"guidance: {checks.name_of(guidance)} must have {' and '.join(missing)}, see Guidance")
    if not callable(guidance.reward):  # type: ignore[attr-defined]
        raise ValueError(f"guidance.reward must be callable, got {type(guidance.reward).__name__}")  # type: ignore[attr-defined]
    checks.integer("guidance.width", guidance.width, 1, MAX_CHAIN_ID + 1)  # type: ignore[attr-defined]
    counts = not isinstance(schedule, TokenSchedule) or (schedule.reveal == "count" and schedule.remask is None)
    if not counts:
        name = type(guidance).__name__
        raise ValueError(
            f'guidance: {name} needs a schedule that reveals by "count" and does not remask, got {schedule}'
        )


def row_ids(chain_ids: Tensor, width: int) -> Tensor:
    """Return the ids (width * B,) of the rows of chains (B,), row by row. Raises ValueError if there are too few."""
    apart = (MAX_CHAIN_ID + 1) // width
    if width > 1 and len(chain_ids) and int(chain_ids.max()) >= apart:
        raise ValueError(f"chain_ids must be below {apart} for {width} rows a chain, got {int(chain_ids.max())}")
    return (chain_ids + apart * torch.arange(width, device=chain_ids.device)[:, None]).flatten()


class Generation(ABC):
    """The generation of B chains, each with `width` rows. Numbers of steps (B,) are int64 on the CPU.

    engine: has width * B rows. free (B, N) bool: what is generated; the rest of `known` (B, N, ...) is given. ids:
    those of `row_ids`. to_samples: turns values (width * B, N, ...) into samples. step_bar: called with the stages
    that were done. totals (B,): the steps T of each chain. start: the states (1, B) before the first step.
    """

    start: States

    def __init__(
        self,
        engine: PartEngine,
        free: Tensor,
        ids: Tensor,
        sampling: Sampling | TokenSampling,
        reward: Reward,
        to_samples: Callable[[Tensor], Tensor],
        step_bar: Callable[[float], object],
    ) -> None:
        self.engine, self.free, self.reward, self.to_samples = engine, free, reward, to_samples
        self.batch, self.width, self.step_bar = len(free), len(ids) // len(free), step_bar
        self.ids, self.seed = ids.view(self.width, self.batch), seed_tensor(sampling.seed, free.device)
        self.counts = free.sum(1).cpu()
        self.totals = torch.tensor([sampling.num_steps(n) for n in self.counts.tolist()], device="cpu")
        self._standing = 0  # steps that the furthest chain has done, for messages
        self._selection = Selection(free.repeat(self.width, 1), self.counts.repeat(self.width))
        self._model_calls, self._reward_calls = torch.zeros(2, self.batch, dtype=torch.int64, device="cpu").unbind()

    @abstractmethod
    def before(self, done: Tensor, steps: int) -> Tensor:
        """Return the numbers of steps (B,) to go back to from `done` (B,), at least `steps` less where there are."""

    @abstractmethod
    def step_back(self, states: States, to: Tensor, iteration: int) -> States:
        """Noise random parts of states (W, B), so that they stand as after `to` (B,) steps: see `before`."""

    @property
    def cost(self) -> Cost:
        return Cost(self._model_calls, self._reward_calls)

    def steps_at(self, level: float) -> Tensor:
        """Return how many steps (B,) are done when a share `level` of them is left."""
        return (self.totals.double() * (1 - level) + 0.5).long()

    def proceed(self, states: States, first: Tensor, last: Tensor, iteration: int, stages: float = 0.0) -> States:
        """Do the steps first..last - 1 of states (W, B) after `first` steps; first, last: (B,) or (W, B).

        stages: how much of the progress bar that is.
        """
        shape, engine = states.values.shape[:2], self.engine
        if shape[0] > self.width:
            raise ValueError(f"guidance: it has {self.width} rows a chain, its width, got states of {shape[0]}")
        rows = shape[0] * self.batch
        self._standing = int(last.max())
        begin, number = (torch.zeros(self.width * self.batch, dtype=torch.int64, device="cpu") for _ in range(2))
        begin[:rows] = first.expand(shape).flatten()
        number[:rows] = (last - first).expand(shape).flatten()
        self._model_calls += number.view(self.width, self.batch).sum(0)
        engine.begin(iteration)
        engine.values[:rows] = states.values.flatten(0, 1)
        slots = tuple(each.new_zeros(self.width * self.batch, each.shape[2]) for each in states.slots)
        for own, given in zip(slots, states.slots, strict=True):
            own[:rows] = given.flatten(0, 1)
        on_share = (lambda share: self.step_bar(share * stages)) if stages else None
        if stages and not bool(number.any()):
            self.step_bar(stages)
        engine.resume(self._selection, begin, number, slots, initial=iteration == 0, on_share=on_share)
        values = engine.values[:rows].unflatten(0, shape).clone()
        return States(values, tuple(own[:rows].unflatten(0, shape) for own in slots))

    def completions(self, states: States, done: Tensor, iteration: int, asked: Tensor | None = None) -> States:
        """Finish states (W, B) after `done` (B,) steps at once, by one call of the model: by their last step.

        asked (W, B) bool on the CPU: the rows to complete; None for all.
        """
        last = self.totals.expand(states.values.shape[:2])
        unfinished = done < last if asked is None else (done < last) & asked
        completed = self.proceed(states, last - unfinished.long(), last, iteration)
        self._standing = int(done.max())  # of the states whose completions are rated
        return completed

    def samples(self, states: States) -> Tensor:
        """Return states (W, B) as samples (W, B, ...)."""
        shape = states.values.shape[:2]
        rows = self.engine.values.clone()
        rows[: shape[0] * self.batch] = states.values.flatten(0, 1)
        return self.to_samples(rows)[: shape[0] * self.batch].unflatten(0, shape)

    def rewards(self, states: States, asked: Tensor | None = None) -> Tensor:
        """Return the rewards (W, B) float64 of finished states (W, B); NaN where they are not asked (W, B) for."""
        x = self.samples(states)
        asked = torch.ones(x.shape[:2], dtype=torch.bool, device="cpu") if asked is None else asked
        rows = asked.flatten().nonzero().flatten().to(x.device)
        rewards = torch.full((asked.numel(),), torch.nan, dtype=torch.float64, device=x.device)
        if len(rows):
            found = rewards_of(self.reward, x.flatten(0, 1)[rows], self._standing, "step")
            if found.device.type != "cpu":
                check_nan(self.reward, found.isnan())
            rewards.index_copy_(0, rows, found)
            self._reward_calls += asked.sum(0)
        return rewards.view(x.shape[:2])

    def choose(self, gains: Tensor, temperature: float, rows: int, iteration: int) -> Tensor:
        """Draw rows (rows, B) of each chain with probabilities proportional to exp(gains / temperature) (W, B)."""
        gains = gains.nan_to_num(-LARGEST, LARGEST, -LARGEST)
        share = ((gains - gains.amax(0)) / temperature).softmax(0).cumsum(0)
        at = torch.full((), iteration, device=share.device)
        u = log_uniforms(self.seed, at, self.ids[:rows].flatten()).exp().view(rows, self.batch)
        found = torch.searchsorted(share.T.contiguous(), u.T.contiguous(), right=True).T
        return found.clamp_max(len(share) - 1)


LARGEST = 1e300  # in place of an infinite gain


def pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen (R, B) of rows (W, B, ...): (R, B, ...)."""
    index = chosen.view(*chosen.shape, *(1,) * (rows.ndim - 2)).expand(*chosen.shape, *rows.shape[2:])
    return rows.gather(0, index)
