"""Acceptance of proposals by a reward: `Metropolis`, given as `accept` to `refine_batch`, and its state in a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.accept import Kept, accept, log_uniforms
from ipr_fast.kernels.philox import seed_tensor
from ipr_fast.sampling import user_code
from ipr_fast.sampling.rewards import Reward, callable_reward, check_nan, rewards_of
from ipr_fast.trace import span

# On a CPU a uniform number takes as many operations as a thousand: one chain draws those of 32 iterations at once.
AHEAD, DRAWN = 32, 1024


class Acceptance(NamedTuple):
    """What the chains (B,) of a call did.

    reward: (B,) float64, of the samples that were returned. proposed, accepted: (B,) int64, proposals in which patches
    had been renoised, and those of them that were accepted. reward_calls: how often the reward was called, with B
    samples each time.
    """

    reward: Tensor
    proposed: Tensor
    accepted: Tensor
    reward_calls: int


class Metropolis:
    """Accept the proposal of an iteration with probability min(1, exp((r' - r) / temperature)), else keep the sample.

    reward: called as reward(x) with all samples of a call; returns (B,) real numbers, higher is better. -inf marks
        samples that lose to any other. It sees the samples before the first iteration and after each one, and changes
        neither them nor the model.
    temperature: >= 0, or a function of the iteration (from `first_iteration` on), for annealing. 0 is greedy: what is
        as good is accepted.
    keep_best: return each chain's sample of the highest reward seen, the first of equals, in place of its last one. The
        callback and mask_fn see the last one.

    `last` describes the last call in which this object judged proposals: an `Acceptance`; None before.

    If regenerating leaves the model's law p(x) as it is (one token at a time with consistent conditionals, or enough
    small steps; and patches chosen whatever the sample) the law of the chains tends to p(x) exp(reward / temperature).
    Source: Metropolis et al. 1953; Lee et al. 2025, "Effective Test-Time Scaling of Discrete Diffusion through
    Iterative Refinement" (IterRef), whose weights make it the same rule.
    """

    def __init__(
        self, reward: Reward, temperature: float | Callable[[int], float] = 0.0, *, keep_best: bool = False
    ) -> None:
        self.reward, self.keep_best = callable_reward(reward), checks.boolean("keep_best", keep_best)
        self.temperature = temperature if callable(temperature) else _temperature(temperature)
        self.last: Acceptance | None = None

    def __repr__(self) -> str:
        options = ", keep_best=True" if self.keep_best else ""
        temperature = checks.name_of(self.temperature) if callable(self.temperature) else self.temperature
        return f"Metropolis({checks.name_of(self.reward)}, {temperature}{options})"

    def temperature_at(self, iteration: int) -> float:
        """Return the temperature of an iteration."""
        if not callable(self.temperature):
            return self.temperature
        name = f"temperature {checks.name_of(self.temperature)}"
        value = user_code.call(name, iteration, self.temperature, iteration)
        return checks.number(f"{name} in iteration {iteration}", value, 0)


def _temperature(value: float) -> float:
    try:
        return checks.number("temperature", value, 0)
    except ValueError as error:
        raise ValueError(f"{error}; a function of the iteration is a schedule") from None


def check_rule(accept: object) -> None:
    """Raise ValueError for an `accept` that is neither a rule nor None."""
    if accept is not None and not isinstance(accept, Metropolis):
        hint = ", make it with ipr_fast.Metropolis(reward, temperature)" if callable(accept) else ""
        raise ValueError(f"accept must be an ipr_fast.Metropolis, got {checks.instance_or_class(accept)}{hint}")


class Acceptor:
    """The chains of a call: their samples and rewards, and the best ones.

    values: (B, N, ...) the engine's, before the first iteration; x: the samples, which the reward may keep.
    """

    def __init__(self, rule: Metropolis, values: Tensor, x: Tensor, chain_ids: Tensor, seed: int, first: int) -> None:
        self.rule, self.chain_ids, self.seed = rule, chain_ids, seed_tensor(seed, values.device)
        self.kept = Kept(values.clone(), rewards_of(rule.reward, x, first, "the call before iteration"))
        self.best = Kept(*(each.clone() for each in self.kept)) if rule.keep_best else None
        batch, device = len(values), values.device
        self._accepted, self._improved = torch.zeros(2, batch, dtype=torch.bool, device=device)
        self._nan = self.kept.reward.isnan()
        self._numbers = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._temperature = torch.zeros((), dtype=torch.float64, device=device)
        self._first, self._ahead = first, max(1, min(AHEAD, DRAWN // max(1, batch)))
        self._calls, self._best_changed = 1, torch.zeros(values.shape[:2], dtype=torch.bool, device=device)

    def decide(
        self, values: Tensor, x: Tensor, iteration: int, on_device: Tensor, renoised: Tensor, changed: Tensor
    ) -> None:
        """Accept or reject the proposals of an iteration.

        values: proposals, replaced by the kept samples where they are rejected. x: the proposals as samples. on_device:
        the iteration, (). renoised: (B, N) bool, of this iteration. changed: (B, N) bool, updated: what may differ from
        the first samples.
        """
        rule = self.rule
        reward = rewards_of(rule.reward, x, iteration)
        self._calls += 1
        self._nan |= reward.isnan()
        self._temperature.fill_(rule.temperature_at(iteration))
        with span("accept"):
            accept(
                values,
                reward,
                kept=self.kept,
                accepted=self._accepted,
                temperature=self._temperature,
                iteration=on_device,
                chain_ids=self.chain_ids,
                seed=self.seed,
                best=self.best,
                improved=None if self.best is None else self._improved,
                log_u=self._log_uniforms(iteration),
            )
            changed |= renoised & self._accepted[:, None]
            if self.best is not None:
                torch.where(self._improved[:, None], changed, self._best_changed, out=self._best_changed)
            proposed = renoised.any(1)
            self._numbers += torch.stack([proposed, proposed & self._accepted])

    def _log_uniforms(self, iteration: int) -> Tensor | None:
        """Return those of the iterations that a CPU has drawn ahead; iterations come one after another."""
        if self.chain_ids.device.type != "cpu":
            return None
        row = (iteration - self._first) % self._ahead
        if row == 0:
            drawn = torch.arange(iteration, iteration + self._ahead, device="cpu")[:, None]
            self._drawn = log_uniforms(self.seed, drawn, self.chain_ids)
        return self._drawn[row]

    @property
    def accepted(self) -> Tensor:
        """(B,) bool, which chains took the last proposal."""
        return self._accepted

    def finish(self, values: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values to return and where they may differ from the first samples; describe the call in `last`."""
        if self._nan.device.type != "cpu":
            check_nan(self.rule.reward, self._nan)
        kept = self.kept if self.best is None else self.best
        proposed, accepted = self._numbers
        self.rule.last = Acceptance(kept.reward, proposed, accepted, self._calls)
        return (values, changed) if self.best is None else (self.best.values, self._best_changed)
