"""A generation of tokens that stops between two steps, steps back, branches and goes on: what guidance is made of.

Each of B chains has `width` rows, which run together in the engine's lanes. Row w of chain i draws its random numbers
as chain i + w floor(2^32 / width), so row 0 is the chain of a generation without guidance. Steps of that generation
draw in iteration 0; every other use draws in an iteration of its own from `FIRST_ITERATION` on, far beyond those of
refinement. So candidates are fresh, and no chain depends on its batch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.accept import log_uniforms
from ipr_fast.kernels.philox import MAX_CHAIN_ID, seed_tensor
from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.sampling.rewards import Reward, check_nan, rewards_of
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


class Guidance(Protocol):
    """A method that generates samples toward a reward."""

    reward: Reward

    @property
    def width(self) -> int:
        """How many rows a chain has at most."""
        ...

    def generate(self, generation: Generation) -> Tensor:
        """Return samples (B, N)."""
        ...


class PartEngine(Protocol):
    """The engine's part of a generation: see `ipr_fast.engine.engine.Engine`."""

    values: Tensor
    iteration: Tensor

    def begin(self, iteration: int) -> None: ...

    def resume(self, selection: Selection, first: Tensor, steps: Tensor) -> None: ...


def check_guidance(guidance: object, schedule: object) -> None:
    """Raise ValueError for what is no guidance, and for samples that it cannot be applied to."""
    if not hasattr(guidance, "generate") or isinstance(guidance, type):
        raise ValueError(f"guidance must be such as ipr_fast.IterRef(reward, ...), got {checks.name_of(guidance)}")
    name = type(guidance).__name__
    if not isinstance(schedule, TokenSchedule):
        raise ValueError(f"guidance: {name} is for models of tokens, got a model of images")
    if schedule.reveal != "count" or schedule.remask is not None:
        raise ValueError(
            f'guidance: {name} needs a schedule that reveals by "count" and does not remask, got {schedule}'
        )


def row_ids(chain_ids: Tensor, width: int) -> Tensor:
    """Return the ids (width * B,) of the rows of chains (B,), row by row. Raises ValueError if there are too few."""
    apart = (MAX_CHAIN_ID + 1) // width
    if width > 1 and len(chain_ids) and int(chain_ids.max()) >= apart:
        raise ValueError(f"chain_ids must be below {apart} for {width} rows a chain, got {int(chain_ids.max())}")
    return (chain_ids + apart * torch.arange(width, device=chain_ids.device)[:, None]).flatten()


class Generation:
    """The generation of B chains, each with `width` rows (W, B, N). Numbers of steps (B,) are int64 on the CPU.

    engine: has width * B rows. start (B, N): the known tokens; free (B, N) bool: where there are none. ids: those of
    `row_ids`. totals (B,): the steps T of each chain.
    """

    def __init__(
        self,
        engine: PartEngine,
        start: Tensor,
        free: Tensor,
        ids: Tensor,
        sampling: TokenSampling,
        mask_id: int,
        reward: Reward,
    ) -> None:
        self.engine, self.free, self.mask_id, self.reward = engine, free, mask_id, reward
        self.batch, self.width = len(start), len(ids) // len(start)
        self.ids, self.seed = ids.view(self.width, self.batch), seed_tensor(sampling.seed, start.device)
        self.start = start.masked_fill(free, mask_id)
        counts = free.sum(1).cpu()
        self.totals = torch.tensor([sampling.num_steps(n) for n in counts.tolist()], device="cpu")
        visible = sampling.schedule.tables(free.shape[1]).visible
        assert visible is not None, "guidance needs a schedule that reveals by count"
        self._visible = torch.nn.functional.pad(visible[counts].long(), (1, 0))  # (B, T + 1), after so many steps
        self._selection = Selection(free.repeat(self.width, 1), counts.repeat(self.width))
        self._model_calls, self._reward_calls = torch.zeros(2, self.batch, dtype=torch.int64, device="cpu").unbind()

    @property
    def cost(self) -> Cost:
        return Cost(self._model_calls, self._reward_calls)

    def steps_at(self, level: float) -> Tensor:
        """Return how many steps (B,) are done when a share `level` of them is left."""
        return (self.totals.double() * (1 - level) + 0.5).long()

    def proceed(self, tokens: Tensor, first: Tensor, last: Tensor, iteration: int) -> Tensor:
        """Do the steps first..last - 1 of tokens (W, B, N) after `first` steps; first, last: (B,) or (W, B)."""
        rows, engine = tokens.shape[0] * self.batch, self.engine
        begin, number = (torch.zeros(self.width * self.batch, dtype=torch.int64, device="cpu") for _ in range(2))
        begin[:rows] = first.expand(tokens.shape[:2]).flatten()
        number[:rows] = (last - first).expand(tokens.shape[:2]).flatten()
        self._model_calls += number.view(self.width, self.batch).sum(0)
        engine.begin(iteration)
        engine.values[:rows] = tokens.flatten(0, 1)
        engine.resume(self._selection, begin, number)
        return engine.values[:rows].view_as(tokens).clone()

    def step_back(self, tokens: Tensor, to: Tensor, iteration: int) -> Tensor:
        """Mask random ones of the revealed tokens (W, B, N), so that they stand as after `to` (B,) steps."""
        left = self._visible.gather(1, to[:, None])[:, 0].to(tokens.device).repeat(len(tokens))
        seen = (self.free & (tokens != self.mask_id)).flatten(0, 1)
        size = (seen.sum(1) - left).clamp_min(0)
        choice = PatchChoice(seen, size, torch.full((), iteration, device=tokens.device))
        masked = choose_patches(choice, seed=self.seed, chain_ids=self.ids[: len(tokens)].flatten())
        return tokens.masked_fill(masked.view_as(tokens), self.mask_id)

    def completions(self, tokens: Tensor, done: Tensor, iteration: int, asked: Tensor | None = None) -> Tensor:
        """Draw all masked tokens (W, B, N) of states after `done` (B,) steps at once, from one call of the model.

        asked (W, B) bool on the CPU: the rows to complete; None for all.
        """
        last = self.totals.expand(tokens.shape[:2])
        unfinished = done < last if asked is None else (done < last) & asked
        return self.proceed(tokens, last - unfinished.long(), last, iteration)

    def rewards(self, x: Tensor, asked: Tensor | None = None) -> Tensor:
        """Return the rewards (W, B) float64 of samples (W, B, N); NaN where they are not asked (W, B) for."""
        asked = torch.ones(x.shape[:2], dtype=torch.bool, device="cpu") if asked is None else asked
        rows = asked.flatten().nonzero().flatten().to(x.device)
        found = rewards_of(self.reward, x.flatten(0, 1)[rows], 0)
        if found.device.type != "cpu":
            check_nan(self.reward, found.isnan())
        self._reward_calls += asked.sum(0)
        rewards = torch.full((asked.numel(),), torch.nan, dtype=torch.float64, device=x.device)
        return rewards.index_copy_(0, rows, found).view(x.shape[:2])

    def choose(self, log_weights: Tensor, rows: int, iteration: int) -> Tensor:
        """Draw rows (rows, B) of each chain with probabilities proportional to exp(log_weights) (W, B)."""
        share = log_weights.nan_to_num(-LARGEST, LARGEST, -LARGEST).softmax(0).cumsum(0)
        at = torch.full((), iteration, device=share.device)
        u = log_uniforms(self.seed, at, self.ids[:rows].flatten()).exp().view(rows, self.batch)
        found = torch.searchsorted(share.T.contiguous(), u.T.contiguous(), right=True).T
        return found.clamp_max(len(share) - 1)


LARGEST = 1e300  # in place of an infinite logarithm of a weight


def pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen (R, B) of rows (W, B, ...): (R, B, ...)."""
    index = chosen.view(*chosen.shape, *(1,) * (rows.ndim - 2)).expand(*chosen.shape, *rows.shape[2:])
    return rows.gather(0, index)
