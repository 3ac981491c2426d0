"""Idle lane-steps of ragged batches, whose chains have different numbers of patches to regenerate.

    python bench/waves.py --out FILE.json     count, time (three minutes of a core), print a table, write the numbers
    python bench/waves.py --report FILE.json  print an earlier measurement

Counted: the share of lane-steps that no chain needs, for 4,096 boards of 9x9 cells with 0 to 26 clues. Timed: boards of
4x4 cells with 0 to 8 clues, by the bundled model, with every lane running until the last chain is done, and as the
engine runs them; interleaved, after a check that both give the same boards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from support import script
from support.harness import Clock, interleaved, quartiles

import ipr_fast
from ipr_fast import Denoiser, Schedule, random_patches
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import RoundedSizes, exact_size, make_plan
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection

BOARDS, MOST_CLUES = 4096, 26
LANES = (64, 256, 1024, 4096)
TASKS = {"refine": (Schedule(10, 0.8), 0.25), "generate": (Schedule(3, 0.0), 1.0)}


def count() -> list[dict]:
    """Count the idle share for each task and number of lanes, by scheduling strategy."""
    clues = torch.randint(0, MOST_CLUES + 1, (BOARDS,), generator=torch.Generator().manual_seed(0))
    rows = []
    for task, (schedule, share) in TASKS.items():
        counts = (share * (81 - clues)).long()
        for lanes in LANES:
            longest_first = make_plan(counts, schedule.steps, lanes, lambda chains, lanes=lanes: lanes)
            rounded = make_plan(counts, schedule.steps, lanes, RoundedSizes(lanes))
            exact = make_plan(counts, schedule.steps, lanes, exact_size)
            in_arrival_order = sum(
                lanes * schedule.steps(int(counts[first : first + lanes].max())) for first in range(0, BOARDS, lanes)
            )
            plans = (longest_first, rounded, exact)
            idle = [1 - longest_first.chain_steps / in_arrival_order, *(plan.idle_share for plan in plans)]
            rows.append({"task": task, "lanes": lanes, "idle": idle})
    return rows


def measure(boards: int, rounds: int) -> dict:
    """Count and time."""
    return {"idle": count(), "boards": boards, "rounds": rounds, "timed": time_arms(boards, rounds)}


def time_arms(boards: int, rounds: int) -> list[dict]:
    """Time a generation and an iteration of refinement; return seconds and the speed-up without idle lanes."""
    model = ipr_fast.load_model("digit-sudoku-4x4")
    generator = torch.Generator().manual_seed(0)
    clues = torch.randint(0, 9, (boards,), generator=generator)
    known = torch.rand(boards, 16, generator=generator).argsort(1).argsort(1) < clues[:, None]
    x = model.grid.to_patches(ipr_fast.generate_batch(boards, model=model, schedule=Schedule(1, 1.0)))
    rows = []
    for task, schedule in (("generate", model.generate_schedule), ("refine", model.refine_schedule)):
        free = ~known
        if task == "refine":
            policy = random_patches(0.5).bind(model.grid, boards, free.device)
            free = policy.choose(free, seed=0, iteration=torch.tensor(1), chain_ids=torch.arange(boards))
        arms = {name: make_run(model, x, schedule, free, name == "every lane") for name in ("every lane", "engine")}
        torch.testing.assert_close(arms["every lane"](), arms["engine"](), atol=1e-3, rtol=0)
        seconds = interleaved(arms, x.device, rounds, Clock(math.inf))
        ratios = [a / b for a, b in zip(seconds["every lane"], seconds["engine"], strict=True)]
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows.append({"task": task, "seconds": medians, "ratio": quartiles(ratios)})
    return rows


def make_run(
    model: Denoiser, x: torch.Tensor, schedule: Schedule, free: torch.Tensor, every: bool
) -> Callable[[], torch.Tensor]:
    """Return a regeneration of the free patches; with `every`, each lane runs until the last chain is done."""
    sampling, ids = Sampling(schedule), torch.arange(len(x))

    def run() -> torch.Tensor:
        runner = Runner(PatchLanes(model, len(x), x.device, PatchSettings.of(sampling)))
        if every:
            runner.lanes_for = lambda chains: len(x)
        engine = Engine(runner, x, ids, sampling)
        engine.begin(1)
        engine.regenerate(Selection(free, free.sum(1)))
        return engine.values

    return run


def report(results: dict) -> str:
    """Format the measurement as Markdown."""
    lines = [
        "| idle lane-steps | lanes | arrival order | longest first | + early exit, rounded | + early exit, exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["idle"]:
        shares = " | ".join(f"{100 * share:.1f} %" for share in row["idle"])
        lines.append(f"| {row['task']} | {row['lanes']:,} | {shares} |")
    speedups = []
    for row in results["timed"]:
        low, middle, high = row["ratio"]
        speedups.append(f"{middle:.2f} [{low:.2f}, {high:.2f}] times faster to {row['task']}")
    lines += [
        "",
        f"{BOARDS:,} boards of 9x9 cells with 0 to {MOST_CLUES} clues. Timed with the bundled model on "
        f"{results['boards']} boards of 4x4 cells with 0 to 8 clues (to refine: half of the free cells), chains that "
        f"leave one by one are "
        f"{' and '.join(speedups)} than lanes that all run to the end ({results['rounds']} rounds, quartiles). "
        f"{measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def main() -> None:
    boards = {"type": script.at_least(1), "default": 512, "help": "to time (default 512)"}
    rounds = {"type": script.at_least(2), "default": 11, "help": "at least 2 (default 11)"}
    script.run(__doc__, measure, report, boards=boards, rounds=rounds)


if __name__ == "__main__":
    main()
