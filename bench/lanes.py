"""The fastest number of chains at a time on a CPU, and its memory.

    python bench/lanes.py --out FILE.json     measure (five minutes of a core), print a table, write the numbers
    python bench/lanes.py --report FILE.json  print an earlier measurement

Each arm refines the same chains for one short iteration, a number of chains at a time; the arms take turns and give
the same samples. `CPU_PATCHES` in ipr_fast/engine/graph_cache.py is chosen by this table.
"""

from __future__ import annotations

import math
import statistics

import torch
from support import script
from support.harness import Clock, interleaved, most_bytes, quartiles

import ipr_fast
from ipr_fast import Schedule, random_patches
from ipr_fast.evaluation.environment import measured_at

SCHEDULE = Schedule(2, 0.9)
SUBJECTS = {
    "4x4 boards": ("digit-sudoku-4x4", 2048, (16, 64, 128, 256, 512, 1024, 2048)),
    "9x9 boards": ("digit-sudoku-9x9", 512, (16, 64, 128, 256, 512)),
}


def measure(rounds: int, share: float) -> dict:
    """Measure every subject."""
    return {"rounds": rounds, "subjects": [measure_subject(name, rounds, share) for name in SUBJECTS]}


def measure_subject(name: str, rounds: int, share: float) -> dict:
    """Return seconds and peak bytes for each number of chains at a time, and the speed-up over all at once."""
    model, chains, lanes = SUBJECTS[name]
    model, chains = ipr_fast.load_model(model), max(2, round(chains * share))
    lanes = sorted({min(number, chains) for number in lanes})
    x = torch.zeros(chains, *model.grid.sample_shape)

    def run(number: int) -> torch.Tensor:
        return ipr_fast.refine_batch(x, random_patches(), 1, model=model, schedule=SCHEDULE, max_chains=number)

    device, arms, peak = x.device, {}, {}
    for number in lanes:
        peak[number], refined = most_bytes(lambda number=number: run(number), device)
        torch.testing.assert_close(refined, run(lanes[-1]), atol=1e-3, rtol=0)
        arms[str(number)] = lambda number=number: run(number)
    seconds = interleaved(arms, device, rounds, Clock(math.inf))
    together = seconds[str(lanes[-1])]
    rows = [
        {
            "lanes": number,
            "seconds": statistics.median(seconds[str(number)]),
            "faster": quartiles([whole / own for whole, own in zip(together, seconds[str(number)], strict=True)]),
            "bytes": peak[number],
        }
        for number in lanes
    ]
    return {"name": name, "chains": chains, "rows": rows}


def report(results: dict) -> str:
    """Format the measurement as Markdown."""
    lines = [
        "| chains | at a time | faster than all at once, times | ms a chain | memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for subject in results["subjects"]:
        for row in subject["rows"]:
            low, middle, high = row["faster"]
            each, size = 1e3 * row["seconds"] / subject["chains"], row["bytes"] / 2**20
            lines.append(
                f"| {subject['chains']:,} {subject['name']} | {row['lanes']:,} | {middle:.2f} [{low:.2f}, {high:.2f}] "
                f"| {each:.3g} | {size:,.0f} MiB |"
            )
    lines += [
        "",
        f"One iteration of {SCHEDULE.steps_per_patch} steps a patch, {results['rounds']} rounds in turns, quartiles. "
        f"{measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def main() -> None:
    rounds = {"type": script.at_least(2), "default": 5, "help": "at least 2 (default 5)"}
    share = {"type": float, "default": 1.0, "help": "of the chains, to try it (default 1)"}
    script.run(__doc__, measure, report, rounds=rounds, share=share)


if __name__ == "__main__":
    main()
