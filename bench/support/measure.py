"""How everything here is timed: after a check, against its yardsticks in turn, each round ending on an idle device.

pytest-benchmark times the subject and writes the file; before each of its rounds the yardsticks (baselines, a copy, a
matrix product) are timed once each. So a ratio is of times that stand side by side, and what slows the machine down for
a while slows both. What was measured and checked goes to `extra_info`; records.py reads it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from support.harness import FEWEST_ROUNDS, Clock, free_memory, seconds, synchronize
from support.records import Record

MOST_ROUNDS = 25


class Check(NamedTuple):
    """How far a result is from that of `against`, and how far it may be; in the result's own numbers."""

    against: str
    difference: float
    tolerance: float

    def hold(self) -> None:
        """No figure from a wrong result."""
        assert self.difference <= self.tolerance, f"{self.difference:.3g} off, {self.tolerance:.3g} allowed: {self}"


class Arm(NamedTuple):
    """One side of a comparison: a call of `work` does so many units, after `reset`, which is not timed."""

    work: Callable[[], object]
    units: float = 1.0
    reset: Callable[[], object] = lambda: None

    def seconds(self, device: torch.device) -> float:
        self.reset()
        return seconds(self.work, device)


@dataclass
class Measure:
    """The fixture `measure`: checks and times one subject, and keeps the record of it for the summary."""

    benchmark: object  # pytest-benchmark's fixture
    device: torch.device
    clock: Clock
    records: list[Record]

    def __call__(
        self,
        check: Callable[[], Check],
        ours: Arm,
        against: Mapping[str, Arm] | None = None,
        *,
        unit: str,
        budget: float = 3.0,
        needs: float = 5.0,
        derive: Callable[[Record], dict[str, object]] = lambda record: {},
        **facts: object,
    ) -> None:
        """Check, then time `ours` and its yardsticks for about `budget` seconds, at least FEWEST_ROUNDS rounds.

        unit: what an arm's units are. A rate is units a second; a ratio is our rate over theirs, round by round.
        needs: skip, where less than so many seconds are left of the whole run.
        derive: more facts, from the record of what was measured.
        facts: what JSON can hold, to say what was measured: subject, batch, iters, flops, bytes, peak_bytes, ...
        """
        self.may_take(needs)
        against = dict(against or {})
        free_memory(self.device)
        first = {name: arm.seconds(self.device) for name, arm in {"ours": ours, **against}.items()}
        found = check()
        found.hold()
        times: dict[str, list[float]] = {name: [] for name in against}

        def before() -> None:
            done = len(next(iter(times.values()), []))
            names = list(against)
            for name in names[done % len(names) :] + names[: done % len(names)] if names else ():
                times[name].append(against[name].seconds(self.device))
            ours.reset()
            synchronize(self.device)

        def timed() -> None:
            ours.work()
            synchronize(self.device)

        self.benchmark.pedantic(timed, setup=before, rounds=self._rounds([ours, *against.values()], budget))
        if self.benchmark.disabled:
            return
        self.benchmark.extra_info |= {
            **facts,
            "device": self.device.type,
            "unit": unit,
            "units": ours.units,
            "check": found._asdict(),
            "first_call": first["ours"],
            "against": {
                name: {"units": arm.units, "seconds": times[name], "first_call": first[name]}
                for name, arm in against.items()
            },
        }
        made = self.benchmark
        record = Record(made.name, made.group, list(made.stats.stats.data), made.extra_info)
        record.facts.update(derive(record))
        self.records.append(record)

    def may_take(self, seconds: float) -> None:
        """Skip the benchmark where less time is left."""
        if not self.clock.fits(seconds):
            pytest.skip(f"{self.clock.left():.0f} s are left, and it needs about {seconds:.0f}")

    def _rounds(self, arms: list[Arm], budget: float) -> int:
        if self.benchmark.disabled:
            return 1
        took, budget = 0.0, min(budget, self.clock.left())
        for arm in arms:
            took += arm.seconds(self.device)
            if FEWEST_ROUNDS * took >= budget:
                return FEWEST_ROUNDS
        return min(MOST_ROUNDS, int(budget / max(took, 1e-9)))
