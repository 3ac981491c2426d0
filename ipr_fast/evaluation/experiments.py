"""What refinement does to a model's samples, and what the same compute does when it is spent otherwise.

    python bench/quality.py --out FILE.json     measure, write the numbers, print the table
    python bench/quality.py --report FILE.json  print the table of an earlier measurement

Every arm generates or refines the same chains (seed 0, chain ids 0..B-1), so that arms are compared sample by sample.
With --clues every board has so many given cells, in digit images that no model has seen.
"""

from __future__ import annotations

from collections.abc import Callable

import script
import torch
from torch import Tensor

import ipr_fast
from ipr_fast import Schedule, all_patches, random_patches
from ipr_fast.evaluation import intervals
from ipr_fast.evaluation.demo import draw_clues
from ipr_fast.sampling.policies import MaskPolicy
from ipr_fast.tasks.base import Report
from ipr_fast.tasks.catalog import task_of
from ipr_fast.tasks.sudoku import DigitSudoku, clues_kept

SEED = 0
SHOWN = (1, 2, 5, 10, 20, 50)  # iterations at alpha 0.25 that get a row
OTHER_ALPHAS = (0.1, 0.5)
ARMS = ("alphas", "fixed", "controls", "clues")  # beside one pass and alpha 0.25

Cost = tuple[float, float]  # denoiser calls, and patches sent through the network, a sample


class Bench:
    """Runs arms on B chains and compares each with one pass, sample by sample."""

    def __init__(self, model: str, count: int, clues: tuple[int, int], device: str) -> None:
        self.model = ipr_fast.load_model(model, device=device, dtype=torch.float32)
        self.task = task_of(self.model.grid)
        self.judge, self.count, self.device = self.task.judge(), count, torch.device(device)
        self.num_patches = self.model.grid.num_patches
        self.plan, self.refine_plan = self.model.generate_schedule, self.model.refine_schedule
        if clues[0] >= self.num_patches:
            raise ValueError(f"clues: with {clues[0]} of {self.num_patches} cells given there is nothing to generate")
        known, values = draw_clues(self.task, count, clues, SEED)
        self.known = None if known is None else known.to(self.device)
        self.values = None if values is None else values.to(self.device)
        self.free = [self.num_patches] * count if known is None else (~known).sum(1).tolist()
        self.one_pass = self.generate(self.plan)
        self.before = self.judge(self.one_pass)

    def generate(self, schedule: Schedule) -> Tensor:
        return ipr_fast.generate_batch(
            self.count,
            model=self.model,
            schedule=schedule,
            seed=SEED,
            known=self.known,
            known_values=self.values,
            progress=True,
        )

    def refine(self, policy: MaskPolicy, iters: int, schedule: Schedule, noise: str = "random") -> list[Report]:
        """What the judge says after 0..iters iterations on the one pass; checks that clues keep their bits."""
        reports = [self.before]

        def note(_: int, refined: Tensor) -> None:
            reports.append(self.judge(refined))
            if self.known is not None and not clues_kept(refined, self.known, self.one_pass, self.task.side).all():
                raise AssertionError("a clue cell has changed")

        options = {"schedule": schedule, "known": self.known, "seed": SEED, "noise": noise}
        ipr_fast.refine_batch(self.one_pass, policy, iters, model=self.model, callback=note, progress=True, **options)
        return reports

    def arm(self, name: str, report: Report, *costs: Cost) -> dict:
        """One row, with the sum of its costs a sample."""
        calls, evaluations = (round(sum(each)) for each in zip(*costs, strict=True))
        return {"name": name, "calls": calls, "evaluations": evaluations, **compare(self.before, report)}

    def cost(self, schedule: Schedule, active: Callable[[int], int], times: int = 1) -> Cost:
        """Of regenerating, `times` times, as many patches as `active` says for so many free ones; the samples' mean.

        `prepare` sends all N patches through once; a call sends the active ones.
        """
        calls = {n: schedule.steps(active(n)) for n in set(self.free)}
        evaluations = {n: self.num_patches + calls[n] * active(n) for n in calls}
        return tuple(times * sum(each[n] for n in self.free) / self.count for each in (calls, evaluations))

    # ------------------------------------------------------------------------------------------------- the arms

    def first(self) -> Cost:
        """What one pass costs."""
        return self.cost(self.plan, _all)

    def refinement(
        self, alpha: float, shown: tuple[int, ...], words: str = "", *, fixed: bool = False, noise: str = "random"
    ) -> tuple[list[dict], list[int]]:
        """IPR at one alpha: a row for each iteration of `shown`, and the good samples after each iteration."""
        reports = self.refine(random_patches(alpha, fixed=fixed), max(shown), self.refine_plan, noise)

        def active(free: int) -> int:
            return max(1, int(alpha * free))

        rows = [
            self.arm(
                f"IPR, alpha {alpha:g}{words}, {r} iteration{'s' * (r > 1)}",
                reports[r],
                self.first(),
                self.cost(self.refine_plan, active, r),
            )
            for r in shown
        ]
        return rows, [int(report.good.sum()) for report in reports]

    def controls(self, calls: int) -> list[dict]:
        """About as many denoiser calls as `calls`, spent on one longer pass, and on renoising everything."""
        once = self.first()[0]
        longer = Schedule(round(self.plan.steps_per_patch * calls / once), self.plan.overlap)
        times = max(1, round((calls - once) / once))
        again = self.refine(all_patches(), times, self.plan)[-1]
        repeated = "once" if times == 1 else f"{times} times"
        longer_pass = self.judge(self.generate(longer))
        return [
            self.arm(f"one pass, {longer.steps_per_patch} steps a patch", longer_pass, self.cost(longer, _all)),
            self.arm(f"renoise everything {repeated}", again, self.cost(self.plan, _all, 1 + times)),
        ]


def _all(free: int) -> int:
    return free


def clue_arms(model: str, boards: int, compared: int, device: str) -> list[dict]:
    """One pass and IPR with 0 to N/2 clue cells a board, in digit images that the model has never seen."""
    high = ipr_fast.load_model(model).grid.num_patches // 2
    bench = Bench(model, boards, (0, high), device)
    after = bench.refine(random_patches(), compared, bench.refine_plan)[-1]
    names = "one pass", f"IPR, alpha 0.25, {compared} iterations"
    rows = [compare(bench.before, report) for report in (bench.before, after)]
    return [{"name": f"0 to {high} clues: {name}", **row} for name, row in zip(names, rows, strict=True)]


def compare(before: Report, after: Report) -> dict:
    """How many samples are good after, what became of those that were and were not before, and the measures' means."""
    was, good = before.good, after.good
    return {
        "good": int(good.sum()),
        "share": intervals.share(good),
        "gain": intervals.paired_gain(was, good),
        "fixed": int((good & ~was).sum()),
        "broken": int((was & ~good).sum()),
        "means": {name: _mean(values) for name, values in after.measures().items()},
    }


def _mean(values: Tensor) -> intervals.Estimate:
    """Of measures, none of which is negative."""
    value, low, high = intervals.mean(values)
    return intervals.Estimate(value, max(0.0, low), high)


def measure(
    model: str, count: int, clues: tuple[int, int], iters: int, compared: int, arms: list[str], device: str
) -> dict:
    """One pass, IPR at alpha 0.25, and the chosen arms."""
    bench = Bench(model, count, tuple(clues), device)
    shown = tuple(sorted({r for r in SHOWN if r < iters} | {iters, compared}))
    rows, curve = bench.refinement(0.25, shown)
    rows.insert(0, bench.arm("one pass", bench.before, bench.first()))
    calls = next(row["calls"] for r, row in zip((0, *shown), rows, strict=True) if r == compared)
    if "alphas" in arms:
        for alpha in OTHER_ALPHAS:
            rows += bench.refinement(alpha, (compared,))[0]
    if "fixed" in arms:
        rows += bench.refinement(0.25, (compared,), ", same region", fixed=True)[0]
        rows += bench.refinement(0.25, (compared,), ", same noise", noise="fixed")[0]
    if "controls" in arms:
        rows += bench.controls(calls)
    if "clues" in arms and isinstance(bench.task, DigitSudoku) and bench.known is None:
        rows += clue_arms(model, count, compared, device)
    task = bench.task
    return {
        "model": model,
        "samples": count,
        "noun": task.noun,
        "adjective": task.adjective,
        "clues": clues,
        "seed": SEED,
        "judge": bench.judge.note,
        "generate_schedule": [bench.plan.steps_per_patch, bench.plan.overlap],
        "refine_schedule": [bench.refine_plan.steps_per_patch, bench.refine_plan.overlap],
        "arms": rows,
        "good_by_iteration": curve,
    }


def report(results: dict) -> str:
    """The results as a Markdown table."""
    noun, good = results["noun"], results["adjective"]
    means = list(results["arms"][0]["means"])
    titles = ["arm", "denoiser calls", "patches through the network", f"{good} {noun}s", "gain over one pass"]
    titles += ["fixed / broken", *(_title(name) for name in means)]
    lines = [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]
    for row in results["arms"]:
        share, gain = intervals.Estimate(*row["share"]), intervals.Estimate(*row["gain"])
        calls, evaluations = (f"{row[key]:,}" if key in row else "" for key in ("calls", "evaluations"))
        change = f"{row['fixed']} / {row['broken']}" if row["fixed"] or row["broken"] else ""
        cells = [row["name"], calls, evaluations, share.percent(), gain.points() if change else "", change]
        lines.append(_row([*cells, *(intervals.Estimate(*row["means"][name]).plain() for name in means)]))
    about, clues = results["environment"], results["clues"]
    given = f", {clues[0]} to {clues[1]} clues" if clues[1] else ""
    judge = results["judge"]
    judged = f" {judge[0].upper()}{judge[1:]}." if judge else ""
    later = {row["commit"]: row["name"].split(":")[0] for row in results["arms"] if "commit" in row}
    again = "".join(f" Rows of {arms}: measured again at {commit}." for commit, arms in later.items())
    lines += [
        "",
        f"{results['samples']:,} {noun}s{given}, seed {results['seed']}, intervals 95 %.{judged} Measured at "
        f"{about['commit']} on {about['device']}, torch {about['torch']}, threads: {about['threads']}.{again}",
    ]
    return "\n".join(lines)


def _title(measure: str) -> str:
    return measure.replace("_std", " deviation")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    count = script.at_least(1)
    script.run(
        __doc__,
        measure,
        report,
        model={"default": "digit-sudoku-4x4"},
        count={"type": count, "default": 2048, "help": "samples (default 2048)"},
        clues={"type": int, "nargs": 2, "default": (0, 0), "metavar": ("LOW", "HIGH"), "help": "default 0 0"},
        iters={"type": count, "default": 50, "help": "iterations at alpha 0.25 (default 50)"},
        compared={"type": count, "default": 20, "help": "iterations of the other arms (default 20)"},
        arms={"nargs": "*", "choices": ARMS, "default": list(ARMS), "help": "default all"},
        device={"default": "cuda" if torch.cuda.is_available() else "cpu"},
    )


if __name__ == "__main__":
    main()
