"""Guard against extra work: compare counts, which no machine or load changes, with a stored baseline.

    python bench/guard.py             compare with bench/results/guard.json; exit status 1 where a count has grown
    python bench/guard.py --update    store what is counted now
    python bench/guard.py --json      print what is counted now

Whole calls run on the CPU, an iteration's parts on tensors without data: with the torch twins, and as Triton kernels.
support/counts.py says what is counted. An intended change comes with its new baseline. Operators differ between
versions of torch, and where it is built without oneDNN: there only looks at the data fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from support.chains import Step
from support.counts import Counts, count
from support.launches import can_be_counted
from support.subjects import RATIO, makers, num_active

import ipr_fast
from ipr_fast import Denoiser, Schedule, random_patches
from ipr_fast.engine.graph_cache import drop_kept
from ipr_fast.kernels.launch import triton
from ipr_fast.models import packed
from ipr_fast.outputs import write_json

BASELINE = Path(__file__).parent / "results" / "guard.json"
HOST = "host synchronisations"
SLACK = {"operator calls": 0.0, HOST: 0.0, "FLOPs": 1e-3, "bytes": 1e-3, "allocations": 0.0, "allocated bytes": 1e-3}
GENERATE, REFINE = Schedule(1, 0.9), Schedule(2, 0.8)  # few steps, as all are alike
KERNELS = "as kernels"  # in the name of a case that needs Triton


class Row(NamedTuple):
    """One count of a case, stored and now; None if missing."""

    case: str
    count: str
    stored: int | None
    now: int | None

    @property
    def verdict(self) -> str:
        """One of same, better, worse, new, gone."""
        if self.stored is None or self.now is None:
            return "new" if self.stored is None else "gone"
        beyond, slack = self.now - self.stored, SLACK[self.count] * self.stored
        return "worse" if beyond > slack else "better" if beyond < -slack else "same"


def torch_build() -> str:
    """Return torch's version, and whether its build lacks oneDNN: the operators depend on both."""
    version = torch.__version__.split("+")[0]
    return version if packed._can_be_packed(torch.nn.Linear(1, 1)) else f"{version} without oneDNN"


def summary(counts: Counts) -> dict:
    """Return the counts by their names in SLACK, and the calls of each operator."""
    numbers = (len(counts.operations), counts.host_syncs, counts.flops, counts.bytes)
    named = dict(zip(SLACK, (*numbers, counts.allocations, counts.allocated), strict=True))
    return named | {"operators": dict(sorted(counts.by_name.items()))}


def difference(more: dict, fewer: dict) -> dict:
    """Return the counts of one summary minus those of another."""
    operators = {name: calls - fewer["operators"].get(name, 0) for name, calls in more["operators"].items()}
    named = {name: more[name] - fewer[name] for name in SLACK}
    return named | {"operators": {name: calls for name, calls in operators.items() if calls}}


def calls(model: Denoiser, chains: int) -> dict[str, dict]:
    """Count whole calls on the CPU, from allocating lanes to images."""

    def counted(work: Callable[[], object]) -> dict:
        drop_kept()
        return summary(count(work, "cpu"))

    options = {"model": model, "max_chains": chains}  # independent of this machine's memory
    x, policy = torch.zeros(chains, *model.grid.sample_shape), random_patches(RATIO)
    one, two = (
        counted(lambda iters=iters: ipr_fast.refine_batch(x, policy, iters, schedule=REFINE, **options))
        for iters in (1, 2)
    )
    generated = counted(lambda: ipr_fast.generate_batch(chains, schedule=GENERATE, **options))
    drop_kept()
    return {"generate": generated, "refine": one, "one iteration more": difference(two, one)}


def parts(model: Denoiser, chains: int) -> dict[str, dict]:
    """Count the parts of an iteration on meta tensors."""
    found = {}
    for way in (False, True) if can_be_counted() else (False,):
        step = Step.begun(model, chains, num_active(model), REFINE, "meta", kernels=way)
        for part in (step.begin, step.tick):
            found[part.__name__ + f", {KERNELS}" * way] = summary(count(part, "meta", kernels=way))
    return found


def count_all() -> dict[str, dict]:
    """Count all cases."""
    four, nine, unet = (makers(smoke=False)[name]() for name in ("4x4 transformer", "9x9 transformer", "Even Pixels"))
    found = {}

    def add(name: str, chains: int, counted: dict[str, dict]) -> None:
        case = f"{name}, {chains} chain{'s' * (chains > 1)}"
        found.update({f"{case}: {part}": counts for part, counts in counted.items()})

    for name, model, chains in (
        ("4x4 transformer", four, 1),
        ("4x4 transformer", four, 64),
        ("9x9 transformer", nine, 1),
    ):
        add(name, chains, calls(model, chains))
    four, nine, unet = (model.to("meta") for model in (four, nine, unet))
    for name, model, chains in (("4x4 transformer", four, 64), ("9x9 transformer", nine, 64), ("Even Pixels", unet, 8)):
        add(name, chains, parts(model, chains))
    return found


def compare(stored: dict[str, dict], now: dict[str, dict]) -> list[Row]:
    """Return a row for every count of every case."""
    cases = dict.fromkeys((*stored, *now))
    return [
        Row(case, name, *(each[case][name] if case in each else None for each in (stored, now)))
        for case in cases
        for name in SLACK
    ]


def failures(rows: list[Row], same_torch: bool, with_kernels: bool = True) -> list[Row]:
    """Return the rows that fail: counts that have grown, and cases in only one of both."""
    rows = [row for row in rows if with_kernels or KERNELS not in row.case]
    worse = [row for row in rows if row.verdict == "worse" and (same_torch or row.count == HOST)]
    return worse + [row for row in rows if row.verdict in ("gone", "new")]


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = ["| case | count | stored | now | change |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        stored, now = ("" if number is None else f"{number:,}" for number in (row.stored, row.now))
        change = "" if row.verdict == "same" else row.verdict
        if row.verdict in ("worse", "better"):
            change += f", {row.now - row.stored:+,}" + (f" ({row.now / row.stored - 1:+.2%})" if row.stored else "")
        lines.append(f"| {row.case} | {row.count} | {stored} | {now} | {change} |")
    return "\n".join(lines)


def changed_operators(stored: dict[str, dict], now: dict[str, dict], case: str) -> str:
    """Describe which operators a case calls more or less often than stored."""
    before, after = (each[case]["operators"] for each in (stored, now))
    changes = {name: after.get(name, 0) - before.get(name, 0) for name in sorted({*before, *after})}
    return ", ".join(f"{name} {change:+}" for name, change in changes.items() if change) or "the same operators"


def verdict(baseline: dict, now: dict) -> tuple[str, bool]:
    """Compare counts with the baseline; return the report and whether it passes."""
    rows, same_torch = compare(baseline["cases"], now["cases"]), baseline["torch"] == now["torch"]
    with_kernels = any(KERNELS in case for case in now["cases"])
    failed = failures(rows, same_torch, with_kernels)
    lines = [table(rows), ""]
    if not same_torch:
        lines.append(f"The baseline is of torch {baseline['torch']}, this is {now['torch']}: only {HOST} can fail.")
    if not with_kernels:
        lines.append("There is no Triton here: kernels were not counted.")
    for case in dict.fromkeys(row.case for row in rows if row.verdict in ("worse", "better")):
        lines.append(f"{case}: {changed_operators(baseline['cases'], now['cases'], case)}")
    if any(row.verdict == "better" for row in rows):
        lines.append("Some counts are lower than stored: run --update to keep it.")
    if not failed:
        lines.append("Nothing has grown.")
    for case in dict.fromkeys(row.case for row in failed):
        own = ", ".join(f"{row.count} {row.verdict}" for row in failed if row.case == case)
        lines.append(f"FAILED: {case}: {own}")
    return "\n".join(lines), not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--update", action="store_true", help="store what is counted now")
    how.add_argument("--json", action="store_true", help="print what is counted now")
    arguments = parser.parse_args()
    if triton is not None and not can_be_counted():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be counted")
    if arguments.update and triton is None:
        parser.error("--update needs Triton")
    torch.set_num_threads(1)  # counts do not depend on it, and two threads can be in each other's way
    now = {"torch": torch_build(), "cases": count_all()}
    if arguments.json:
        print(json.dumps(now, indent=2))
    elif arguments.update:
        write_json(BASELINE, now)
    else:
        said, well = verdict(json.loads(BASELINE.read_text()), now)
        print(said)
        sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
