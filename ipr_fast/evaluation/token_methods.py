"""Methods of making boards of tokens with a budget of model calls: passes, refinement, remasking and controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ipr_fast.sampling.policies import num_chosen
from ipr_fast.sampling.tokens import TokenSchedule

ALPHAS = (0.1, 0.25, 0.5)
ORDERS = ("random", "margin", "entropy")  # compared with "confidence"
STRATEGIES = ("cap", "rescale", "conf", "loop", "forward_backward")  # of ReMDM
RIVAL = "one pass, confidence"  # with which every method is compared

Maker = Callable[[int], "Method | None"]  # of a budget


class Regeneration(NamedTuple):
    """`times` regenerations of a share `ratio` of the free positions."""

    schedule: TokenSchedule
    ratio: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Method:
    """A pass, then perhaps refinement of its boards, or the better of it and as many other passes.

    first: schedule of the pass. then: the iterations of refinement. samples: passes, of which the one with the fewest
    violations of the rules is taken.
    """

    first: TokenSchedule
    then: Regeneration | None = None
    samples: int = 1

    @property
    def regenerations(self) -> list[Regeneration]:
        passes = Regeneration(self.first, times=self.samples)
        return [passes] if self.then is None else [passes, self.then]


def methods(length: int) -> dict[str, Maker]:
    """Return the methods by name, the most important first: each makes of a budget of calls what to do, if it can.

    length: N. A budget holds for each board, so that fewer free positions may leave calls unused.
    """
    return {
        RIVAL: _one_pass,
        **{f"confidence and IPR, alpha {alpha:g}": partial(_short_iterations, alpha=alpha) for alpha in ALPHAS},
        **{
            f"confidence and IPR, alpha {alpha:g}, one position a call": partial(
                _long_iterations, alpha=alpha, length=length
            )
            for alpha in ALPHAS[:2]
        },
        "confidence, then renoise everything": _renoise_everything,
        "confidence, better of two passes by the rules": _better_of_two,
        **{f"ReMDM {name}, confidence": partial(_one_pass, remask=name) for name in STRATEGIES},
        **{f"one pass, {order}": partial(_one_pass, order=order) for order in ORDERS},
        "ReMDM cap, independent": partial(_one_pass, reveal="independent", remask="cap"),
    }


def _one_pass(budget: int, **options: Any) -> Method:
    return Method(TokenSchedule(budget, **options))


def _better_of_two(budget: int) -> Method:
    return Method(TokenSchedule(budget // 2), samples=2)


def _short_iterations(budget: int, alpha: float) -> Method:
    """Half of the budget for the pass, and a tenth for each iteration."""
    first, calls = budget // 2, max(1, budget // 10)
    return Method(TokenSchedule(first), Regeneration(TokenSchedule(calls), alpha, (budget - first) // calls))


def _long_iterations(budget: int, alpha: float, length: int) -> Method | None:
    """Half of the budget for the pass; as many iterations of one position a call as the other half has room for."""
    first = budget // 2
    times = (budget - first) // num_chosen(alpha, length)
    return Method(TokenSchedule(first), Regeneration(TokenSchedule(), alpha, times)) if times else None


def _renoise_everything(budget: int) -> Method:
    first = budget // 2
    return Method(TokenSchedule(first), Regeneration(TokenSchedule(budget - first)))
