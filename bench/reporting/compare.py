"""Compare two measurements, pair by pair: the speed-up of the new one, with a 95 % interval.

For a benchmark with a yardstick from outside this project (a copy, a plain loop, ...), our time over the yardstick's in
the same round is compared, so that a slower machine cancels; otherwise seconds. The interval is that of the ratio of
medians, by bootstrap over the rounds of each file: it covers variation between rounds, not between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from support.records import Measurement, Record

from reporting.words import short, table

RESAMPLES = 10_000
# Of 300 pairs of equal rounds, 8 % have an interval without 1 at four rounds a side, 2 to 3 % at five to twenty-five.
FEWEST_MARKED = 5
FOREIGN = ("copy", "matrix product", "batched", "one at a time", "per pixel", "torch")  # the first in both files
SAME = ("device", "unit", "subject", "shape", "batch", "dtype", "variant", "call", "iters", "ratio", "steps")
MACHINE = ("device", "processor", "cores", "threads", "python", "torch", "triton", "cuda")


class Pair(NamedTuple):
    """A benchmark in both files: old time over new time, its interval, and the compared quantity."""

    name: str
    faster: float
    low: float
    high: float
    compared: str
    rounds: tuple[int, int]

    @property
    def mark(self) -> str:
        """Faster or slower if the interval excludes 1, else empty."""
        if min(self.rounds) < FEWEST_MARKED or self.low <= 1 <= self.high:
            return ""
        return "**faster**" if self.low > 1 else "**slower**"


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """Return median(old) / median(new) and its 95 % interval."""
    generator = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> np.ndarray:
        chosen = generator.integers(0, len(values), (RESAMPLES, len(values)))
        return np.median(np.asarray(values)[chosen], axis=1)

    low, high = np.quantile(medians(old) / medians(new), (0.025, 0.975))
    return float(np.median(old) / np.median(new)), float(low), float(high)


def pair(old: Record, new: Record) -> Pair:
    """Compare one benchmark of both files."""
    shared = (name for name in FOREIGN if name in old.facts["against"] and name in new.facts["against"])
    yardstick = next(shared, None)

    def compared(record: Record) -> list[float]:
        return record.each() if yardstick is None else [1 / ratio for ratio in record.ratios(yardstick)]

    what = "seconds" if yardstick is None else f"time over that of {yardstick}"
    rounds = len(old.seconds), len(new.seconds)
    return Pair(f"{new.group}: {new.name}", *interval(compared(old), compared(new)), what, rounds)


def compare(old: Measurement, new: Measurement) -> str:
    """Format the comparison as Markdown."""
    before, after = ({(record.group, record.name): record for record in each.records} for each in (old, new))
    both = [key for key in after if key in before]
    changed = {key: _changed(before[key], after[key]) for key in both}
    rows = [
        [
            each.name,
            short(each.faster),
            f"[{short(each.low)}, {short(each.high)}]",
            each.mark,
            each.compared,
            f"{each.rounds[0]}, {each.rounds[1]}",
        ]
        for each in (pair(before[key], after[key]) for key in both if not changed[key])
    ]
    head = ["benchmark", "new is faster, times", "95 % interval", "beyond chance", "compared", "rounds"]
    blocks = [
        _machines(old, new),
        table(head, rows) or "No benchmark is in both files.",
        f"Pairs with fewer than {FEWEST_MARKED} rounds are never marked. Of equal pairs, one in forty or so is marked "
        "nevertheless, and what differs from run to run is in no interval: look at a mark twice.",
        _names("Not compared, since they measure something else", [f"{k[1]} ({v})" for k, v in changed.items() if v]),
        _names(f"Only in {old.name}", [name for group, name in before if (group, name) not in after]),
        _names(f"Only in {new.name}", [name for group, name in after if (group, name) not in before]),
    ]
    return "\n\n".join(filter(None, blocks))


def _changed(old: Record, new: Record) -> str:
    """Return the facts in which two benchmarks of one name differ, so that they do different work."""
    return ", ".join(name for name in SAME if old.facts.get(name) != new.facts.get(name))


def _machines(old: Measurement, new: Measurement) -> str:
    versions = (
        f"Old: {old.name}, commit {old.environment['commit']}. New: {new.name}, commit {new.environment['commit']}."
    )
    other = [name for name in MACHINE if old.environment.get(name) != new.environment.get(name)]
    if not other:
        return versions
    said = "; ".join(f"{name}: {old.environment.get(name)} and {new.environment.get(name)}" for name in other)
    warning = f"**Not the same machine and versions ({said}): seconds are not comparable, ratios only with care.**"
    return f"{warning}\n\n{versions}"


def _names(title: str, names: list[str]) -> str:
    return f"{title}: {', '.join(names)}." if names else ""
