"""The fixture `measure`: checks a benchmark, then times it interleaved with its yardsticks.

pytest-benchmark times the subject and writes the file; before each of its rounds every yardstick (baseline, copy,
matrix product) is timed once. So a ratio compares neighbouring times, and a slow phase of the machine slows both. Facts
and checks go to `extra_info`, which records.py reads.
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
    """The difference of a result from that of `against`, and its tolerance, in the result's own units."""

    against: str
    difference: float
    tolerance: float

    def hold(self) -> None:
        """Raise AssertionError for a wrong result, so that it gives no figure."""
        assert self.difference <= self.tolerance, f"{self.difference:.3g} off, {self.tolerance:.3g} allowed: {self}"


class Arm(NamedTuple):
    """One side of a comparison: a call of `work` does `units` units; `reset` comes before it, not timed."""

    work: Callable[[], object]
    units: float = 1.0
    reset: Callable[[], object] = lambda: None

    def seconds(self, device: torch.device) -> float:
        self.reset()
        return seconds(self.work, device)


@dataclass
class Measure:
    """Checks and times one subject, and keeps its record for the summary.

    budget: seconds of timing, at most; None for each benchmark's own.
    """

    benchmark: object  # pytest-benchmark's fixture
    device: torch.device
    clock: Clock
    records: list[Record]
    budget: float | None = None

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

        unit: name of the arms' units. A rate is units per second; a ratio is our rate over theirs, round by round.
        needs: seconds; skip the benchmark if the run has less time left.
        derive: returns further facts from the record.
        facts: JSON values that describe the measurement: subject, batch, iters, flops, bytes, peak_bytes, ...
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
        """Skip the benchmark if less time is left."""
        if not self.clock.fits(seconds):
            pytest.skip(f"{self.clock.left():.0f} s are left, and it needs about {seconds:.0f}")

    def _rounds(self, arms: list[Arm], budget: float) -> int:
        if self.benchmark.disabled:
            return 1
        took, budget = 0.0, min(budget, self.clock.left(), float("inf") if self.budget is None else self.budget)
        for arm in arms:
            took += arm.seconds(self.device)
            if FEWEST_ROUNDS * took >= budget:
                return FEWEST_ROUNDS
        return min(MOST_ROUNDS, int(budget / max(took, 1e-9)))
