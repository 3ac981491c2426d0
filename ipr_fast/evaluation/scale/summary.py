"""The numbers of a run, from its records: shares and means by arm and iteration, and paired comparisons.

Shards are read one after another and only sums are kept, so memory does not grow with the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ipr_fast.evaluation import intervals
from ipr_fast.evaluation.intervals import Estimate
from ipr_fast.evaluation.scale.folder import RunFolder
from ipr_fast.evaluation.scale.plan import Comparison, Plan
from ipr_fast.evaluation.scale.records import MEASURE
from ipr_fast.evaluation.scale.shards import Shard, shards_of

COSTS = ("model_calls", "evaluations", "reward_calls")
Block = dict[str, np.ndarray]  # columns of the rows of one arm and iteration, by chain


def summarise(folder: RunFolder) -> dict[str, Any]:
    """Return the numbers of a run's finished shards, ready for JSON. Raises ValueError if there is none."""
    plan, done, facts = folder.plan, folder.finished(), dict[str, str]()
    if not done:
        raise ValueError(f"{folder.path}: no shard is done yet")
    points: dict[tuple[str, int, int], Sums] = {}
    pairs: dict[tuple[Comparison, int], Pairs] = {}
    seconds = engine_seconds = 0.0
    for shard in done:
        found, facts = blocks(folder, shard)
        seconds, engine_seconds = seconds + float(facts["seconds"]), engine_seconds + float(facts["engine_seconds"])
        for (arm, iteration), block in found.items():
            points.setdefault((arm, iteration, shard.seed), Sums()).add(block)
        for each in plan.comparisons:
            before, after = compared(plan, each, found)
            pairs.setdefault((each, shard.seed), Pairs()).add(before["good"], after["good"])
    seeds = sorted({shard.seed for shard in done})
    return {
        "experiment": plan.name,
        **{name: getattr(plan, name) for name in ("title", "task", "model", "samples", "clues")},
        **{name: facts[name] for name in ("noun", "adjective", "judge")},
        "seeds": seeds,
        "shards": [len(done), len(shards_of(plan))],
        "arms": [
            {
                "name": arm.name,
                "points": [
                    {"iteration": r, **total([points[arm.name, r, seed] for seed in seeds]).described()}
                    for r in plan.iterations(arm)
                ],
                "by_seed": [points[arm.name, arm.iterations, seed].share() for seed in seeds],
            }
            for arm in plan.arms
        ],
        "comparisons": [
            {
                "arm": each.arm,
                "rival": each.rival,
                **sum_of([pairs[each, seed] for seed in seeds]).described(),
                "by_seed": [pairs[each, seed].gain() for seed in seeds],
            }
            for each in plan.comparisons
        ],
        "seconds": round(seconds, 1),
        "outside_engine": 1 - engine_seconds / seconds if seconds else 0.0,
        **{name: folder.manifest[name] for name in ("commit", "torch", "ipr_fast", "dtype", "device")},
        "processor": facts["processor"],
    }


def compare_runs(one: RunFolder, other: RunFolder) -> list[dict[str, Any]]:
    """Compare two runs sample by sample: the last samples of arms of one name, on the chains that both have done.

    Runs of other tasks or clues have no samples in common.
    """
    if (one.plan.task, one.plan.clues) != (other.plan.task, other.plan.clues):
        return []
    names = [arm.name for arm in one.plan.arms if any(arm.name == rival.name for rival in other.plan.arms)]
    pairs = {name: Pairs() for name in names}
    theirs = _last_good(other, names)
    for key, mine in _last_good(one, names).items():
        if (its := theirs.get(key)) is not None:
            both = (mine >= 0)[: len(its)] & (its >= 0)[: len(mine)]
            pairs[key[0]].add(its[: len(both)][both] > 0, mine[: len(both)][both] > 0)
    return [{"arm": name, "rival": None, **each.described()} for name, each in pairs.items() if each.n]


def _last_good(folder: RunFolder, names: list[str]) -> dict[tuple[str, int], Any]:
    """Return whether the last sample of each chain is good, by arm and seed: 1 or 0, and -1 where it is not done."""
    found = {(name, seed): np.full(folder.plan.samples, -1, np.int8) for name in names for seed in folder.plan.seeds}
    for shard in folder.finished():
        columns = blocks(folder, shard)[0]
        for name in names:
            last = columns[name, folder.plan.arm(name).iterations]
            found[name, shard.seed][shard.first : shard.last] = last["good"]
    return found


def blocks(folder: RunFolder, shard: Shard) -> tuple[dict[tuple[str, int], Block], dict[str, str]]:
    """Return a shard's columns by arm and iteration, rows by chain; and the facts about it."""
    table = folder.read(shard, lambda name: name in (*COSTS, "good") or name.startswith(MEASURE))
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    found, first, count = {}, 0, shard.last - shard.first
    for arm in folder.plan.arms:
        for iteration in folder.plan.iterations(arm):
            found[arm.name, iteration] = {name: values[first : first + count] for name, values in columns.items()}
            first += count
    metadata = table.schema.metadata or {}
    return found, {key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW")}


def compared(plan: Plan, each: Comparison, found: dict[tuple[str, int], Block]) -> tuple[Block, Block]:
    """Return the columns of a comparison's two sides: before, after."""
    after = found[each.arm, plan.arm(each.arm).iterations]
    if each.rival is None:
        return found[each.arm, 0], after
    return found[each.rival, plan.arm(each.rival).iterations], after


class Sums:
    """Sums over samples of one arm after one iteration."""

    def __init__(self) -> None:
        self.n = self.good = 0
        self.costs = dict.fromkeys(COSTS, 0)
        self.measures: dict[str, tuple[float, float]] = {}  # sum, sum of squares

    def add(self, block: Block) -> None:
        self.n, self.good = self.n + len(block["good"]), self.good + int(block["good"].sum())
        for name in COSTS:
            self.costs[name] += int(block[name].sum())
        for name in block:
            if name.startswith(MEASURE):
                values = block[name].astype(np.float64)
                total, squares = self.measures.get(name, (0.0, 0.0))
                self.measures[name] = total + float(values.sum()), squares + float((values**2).sum())

    def share(self) -> Estimate:
        return intervals.share_of(self.good, self.n)

    def described(self) -> dict[str, Any]:
        return {
            "samples": self.n,
            "good": self.good,
            "share": self.share(),
            **{name: total / self.n for name, total in self.costs.items()},
            "means": {
                name.removeprefix(MEASURE): intervals.mean_of(*sums, self.n) for name, sums in self.measures.items()
            },
        }


def total(each: list[Sums]) -> Sums:
    """Pool sums."""
    pooled = Sums()
    for sums in each:
        pooled.n, pooled.good = pooled.n + sums.n, pooled.good + sums.good
        for name in COSTS:
            pooled.costs[name] += sums.costs[name]
        for name, (first, second) in sums.measures.items():
            so_far = pooled.measures.get(name, (0.0, 0.0))
            pooled.measures[name] = so_far[0] + first, so_far[1] + second
    return pooled


class Pairs:
    """Counts of samples that are good on one side of a comparison, on both, or on neither."""

    def __init__(self, n: int = 0, fixed: int = 0, broken: int = 0) -> None:
        self.n, self.fixed, self.broken = n, fixed, broken

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        self.n += len(before)
        self.fixed += int((after & ~before).sum())
        self.broken += int((before & ~after).sum())

    def gain(self) -> Estimate:
        return intervals.gain_of(self.fixed, self.broken, self.n)

    def described(self) -> dict[str, Any]:
        p = intervals.mcnemar(self.fixed, self.broken)
        return {"samples": self.n, "gain": self.gain(), "fixed": self.fixed, "broken": self.broken, "p": p}


def sum_of(each: list[Pairs]) -> Pairs:
    """Pool counts."""
    return Pairs(*(sum(getattr(pairs, name) for pairs in each) for name in ("n", "fixed", "broken")))


def kept_samples(folder: RunFolder, arm: str) -> Iterator[tuple[Shard, dict[int, list[bytes]], dict[int, np.ndarray]]]:
    """Yield, of each shard that has some, the stored samples by iteration, and whether they are good."""
    for shard in folder.finished():
        count = min(shard.last, folder.plan.kept) - shard.first
        if count <= 0:
            continue
        table, first, length = folder.read(shard, ("sample", "good").__contains__), 0, shard.last - shard.first
        samples, good = {}, {}
        for each in folder.plan.arms:
            for iteration in folder.plan.iterations(each):
                if each.name == arm:
                    rows = table.slice(first, count)
                    samples[iteration] = rows.column("sample").to_pylist()
                    good[iteration] = rows.column("good").to_numpy()
                first += length
        yield shard, samples, good
