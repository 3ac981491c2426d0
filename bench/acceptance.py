"""The cost of accepting samples by a reward, as a share of an iteration, on a CPU.

    python bench/acceptance.py --out FILE.json     measure (a minute of a core), print a table, write the numbers
    python bench/acceptance.py --report FILE.json  print an earlier measurement

The reward returns numbers that are there already, so this is the cost outside model and reward: the samples that it
sees, the checks of what it returns, the decision, the copies and the counts. Uniform numbers are drawn for several
iterations at a time, first in the one that is left out, so the medians are without them. Times are CPU times of the
thread, of both parts of the same iteration: another process on the machine slows both.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from support import script
from support.harness import quartiles

import ipr_fast
from ipr_fast import Metropolis, random_patches
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.trace import tracing

SUBJECTS = {
    "4x4 boards": ("digit-sudoku-4x4", (1, 16, 256)),
    "9x9 boards of tokens": ("token-sudoku-9x9", (16,)),
}


class Spent:
    """CPU seconds of the thread in the ranges of each name, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name].append(time.thread_time() - start)


def share_of_acceptance(model: object, chains: int, iterations: int, keep_best: bool) -> list[float]:
    """Return the share of each iteration but the first, which allocates."""
    x = ipr_fast.generate_batch(chains, model=model, schedule=_short(model))
    rewards, spent = torch.zeros(chains), Spent()
    accept = Metropolis(lambda samples: rewards, 1.0, keep_best=keep_best)
    with tracing(spent):
        ipr_fast.refine_batch(x, random_patches(), iterations + 1, model=model, accept=accept)
    pairs = zip(spent.seconds["acceptance"][1:], spent.seconds["iteration"][1:], strict=True)
    return [part / whole for part, whole in pairs]


def _short(model: object) -> ipr_fast.Schedule | ipr_fast.TokenSchedule:
    return ipr_fast.Schedule(1, 1.0) if hasattr(model, "grid") else ipr_fast.TokenSchedule(1)


def measure(iterations: int) -> dict:
    """Measure every subject."""
    torch.set_num_threads(1)  # the thread's time is that of all the work
    rows = []
    for name, (source, numbers) in SUBJECTS.items():
        model = ipr_fast.load_model(source)
        for chains in numbers:
            for keep_best in (False, True):
                shares = share_of_acceptance(model, chains, iterations, keep_best)
                rows.append({"subject": name, "chains": chains, "keep_best": keep_best, "share": quartiles(shares)})
    return {"iterations": iterations, "rows": rows}


def report(results: dict) -> str:
    """Format a measurement as a Markdown table."""
    lines = ["| samples | chains | acceptance, of an iteration | with keep_best |", "| --- | ---: | ---: | ---: |"]
    rows = iter(results["rows"])
    for plain, best in zip(rows, rows, strict=True):
        cells = ("{1:.2%} [{0:.2%}, {2:.2%}]".format(*each["share"]) for each in (plain, best))
        lines.append(f"| {plain['subject']} | {plain['chains']:,} | {' | '.join(cells)} |")
    note = f"Medians of {results['iterations']} iterations, with quartiles. {measured_at(results['environment'])}"
    return "\n".join([*lines, "", note])


def main() -> None:
    how = {"type": script.at_least(1), "default": 7, "help": "iterations of each run (7)"}
    script.run(__doc__, measure, report, iterations=how)


if __name__ == "__main__":
    main()
