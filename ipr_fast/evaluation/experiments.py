"""Experiments on a model: one pass, IPR and controls on the same chains, compared sample by sample.

Every arm generates or refines chains 0..B-1 with one seed, so its gain over one pass is paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.evaluation import environment, intervals
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.report import SHOWN_ITERATIONS
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import MaskPolicy, all_patches, num_chosen, random_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.spaces import DEFAULT_GENERATE_SCHEDULE, DEFAULT_REFINE_SCHEDULE
from ipr_fast.tasks.base import Report
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import DigitSudoku, clues_kept

OTHER_ALPHAS = (0.1, 0.5)
ARMS = ("alphas", "fixed", "controls", "clues")  # optional; one pass and alpha 0.25 are always measured


@dataclass(frozen=True)
class ExperimentSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board, in digit images that no model has seen; each board's number is uniform in
    clues[0]..clues[1]. iters: iterations of IPR at alpha 0.25. compared: iterations of the other arms. arms: of ARMS.
    """

    count: int = 2048
    clues: tuple[int, int] = (0, 0)
    iters: int = 50
    compared: int = 20
    arms: tuple[str, ...] = ARMS
    seed: int = 0


class Cost(NamedTuple):
    """Mean cost of a sample: calls, the NFE; evaluations, the patches computed in those calls."""

    calls: float
    evaluations: float


class Experiment:
    """Runs arms on B chains of a model; `one_pass` holds their samples (B, C, H, W) before refinement.

    Raises ValueError for clues of a task without clues, and for as many clues as cells.
    """

    def __init__(self, task: KnownTask, model: Denoiser, settings: ExperimentSettings, progress: bool = False) -> None:
        self.task, self.model, self.settings, self.progress = task, model, settings, progress
        self.judge, self.num_patches = task.judge(), model.grid.num_patches
        self.generate_schedule: Schedule = getattr(model, "generate_schedule", DEFAULT_GENERATE_SCHEDULE)
        self.refine_schedule: Schedule = getattr(model, "refine_schedule", DEFAULT_REFINE_SCHEDULE)
        if settings.clues[0] >= self.num_patches:
            raise ValueError(
                f"clues must leave a cell to generate, got {settings.clues[0]} clues for {self.num_patches} cells"
            )
        device = contract.device_of(model) or torch.device("cpu")
        self.known: Tensor | None = None
        self.known_values: Tensor | None = None
        clues = draw_clues(task, settings.count, settings.clues, settings.seed)
        if clues is not None:
            self.known, self.known_values = (each.to(device) for each in clues)
        self.free = [self.num_patches] * settings.count if self.known is None else (~self.known).sum(1).tolist()
        self.one_pass = self.generate(self.generate_schedule)
        self.before = self.judge(self.one_pass)

    def generate(self, schedule: Schedule) -> Tensor:
        return generate_batch(
            self.settings.count,
            model=self.model,
            schedule=schedule,
            seed=self.settings.seed,
            known=self.known,
            known_values=self.known_values,
            progress=self.progress,
        )

    def refine(self, policy: MaskPolicy, iters: int, schedule: Schedule, noise: str = "random") -> list[Report]:
        """Return the judge's reports after 0..iters iterations on the one pass; check that clues keep their bits."""
        reports: list[Report] = [self.before]

        def judge_iteration(_: int, refined: Tensor) -> None:
            reports.append(self.judge(refined))
            if self.known is not None and isinstance(self.task, DigitSudoku):
                kept = clues_kept(refined, self.known, self.one_pass, self.task.side)
                if not kept.all():
                    raise AssertionError("refinement has changed a clue cell")

        refine_batch(
            self.one_pass,
            policy,
            iters,
            model=self.model,
            schedule=schedule,
            known=self.known,
            seed=self.settings.seed,
            noise=noise,
            callback=judge_iteration,
            progress=self.progress,
        )
        return reports

    def row(self, name: str, report: Report, *costs: Cost) -> dict:
        """Return one row of the table: the arm's costs, summed, and its comparison with one pass."""
        calls, evaluations = (round(sum(each)) for each in zip(*costs, strict=True))
        return {"name": name, "calls": calls, "evaluations": evaluations, **compare(self.before, report)}

    def cost(self, schedule: Schedule, active: Callable[[int], int], times: int = 1) -> Cost:
        """Return the cost of `times` regenerations of `active(free)` patches, of chains with `free` free ones.

        `prepare` computes all N patches once; a call computes the active ones.
        """
        calls = {free: schedule.steps(active(free)) for free in set(self.free)}
        evaluations = {free: self.num_patches + calls[free] * active(free) for free in calls}
        return Cost(*(times * sum(each[free] for free in self.free) / len(self.free) for each in (calls, evaluations)))

    # ------------------------------------------------------------------------------------------------- the arms

    def one_pass_cost(self) -> Cost:
        return self.cost(self.generate_schedule, _all)

    def refinement(
        self, alpha: float, shown: tuple[int, ...], variant: str = "", *, fixed: bool = False, noise: str = "random"
    ) -> tuple[list[dict], list[int]]:
        """IPR at one alpha: rows after the iterations `shown`, and the number of good samples after each iteration."""
        reports = self.refine(random_patches(alpha, fixed=fixed), max(shown), self.refine_schedule, noise)

        rows = [
            self.row(
                f"IPR, alpha {alpha:g}{variant}, {r} iteration{'s' * (r > 1)}",
                reports[r],
                self.one_pass_cost(),
                self.cost(self.refine_schedule, partial(num_chosen, alpha), r),
            )
            for r in shown
        ]
        return rows, [int(report.good.sum()) for report in reports]

    def controls(self, calls: int) -> list[dict]:
        """Spend about `calls` NFE on one longer pass, and on renoising everything."""
        once, own = self.one_pass_cost().calls, self.generate_schedule
        longer = Schedule(round(own.steps_per_patch * calls / once), own.overlap)
        times = max(1, round((calls - once) / once))
        again = self.refine(all_patches(), times, own)[-1]
        repeated = "once" if times == 1 else f"{times} times"
        longer_pass = self.judge(self.generate(longer))
        return [
            self.row(f"one pass, {longer.steps_per_patch} steps a patch", longer_pass, self.cost(longer, _all)),
            self.row(f"renoise everything {repeated}", again, self.cost(own, _all, 1 + times)),
        ]

    def clue_arms(self) -> list[dict]:
        """One pass and IPR with 0 to N/2 clues a board."""
        high, compared = self.num_patches // 2, self.settings.compared
        clued = Experiment(self.task, self.model, replace(self.settings, clues=(0, high)), self.progress)
        after = clued.refine(random_patches(), compared, clued.refine_schedule)[-1]
        arms = {"one pass": clued.before, f"IPR, alpha 0.25, {compared} iterations": after}
        return [{"name": f"0 to {high} clues: {name}", **compare(clued.before, arms[name])} for name in arms]


def _all(free: int) -> int:
    return free


def run_experiment(
    task: KnownTask, model: Denoiser, name: str, settings: ExperimentSettings, *, progress: bool = False
) -> dict:
    """Run one pass, IPR at alpha 0.25 and the chosen arms; return the measurement, ready for JSON.

    name: of the model, for the record. `report.experiment_table` makes a table of the result.
    """
    experiment, compared, arms = Experiment(task, model, settings, progress), settings.compared, settings.arms
    shown = tuple(sorted({r for r in SHOWN_ITERATIONS if r < settings.iters} | {settings.iters, compared}))
    rows, good_by_iteration = experiment.refinement(0.25, shown)
    calls = rows[shown.index(compared)]["calls"]
    rows.insert(0, experiment.row("one pass", experiment.before, experiment.one_pass_cost()))
    if "alphas" in arms:
        for alpha in OTHER_ALPHAS:
            rows += experiment.refinement(alpha, (compared,))[0]
    if "fixed" in arms:
        rows += experiment.refinement(0.25, (compared,), ", same region", fixed=True)[0]
        rows += experiment.refinement(0.25, (compared,), ", same noise", noise="fixed")[0]
    if "controls" in arms:
        rows += experiment.controls(calls)
    if "clues" in arms and isinstance(task, DigitSudoku) and experiment.known is None:
        rows += experiment.clue_arms()
    generate, refine = experiment.generate_schedule, experiment.refine_schedule
    return {
        **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
        "generate_schedule": [generate.steps_per_patch, generate.overlap],
        "refine_schedule": [refine.steps_per_patch, refine.overlap],
        "arms": rows,
        "good_by_iteration": good_by_iteration,
        "environment": environment.describe(experiment.one_pass.device),
    }


def described(task: KnownTask, name: str, count: int, clues: tuple[int, int], seed: int, note: str) -> dict:
    """Return what a record tells of an experiment's samples. name: of the model; note: the judge's."""
    words = {"noun": task.noun, "adjective": task.adjective, "judge": note}
    return {"model": name, "samples": count, "clues": clues, "seed": seed, **words}


def compare(before: Report, after: Report) -> dict:
    """Return the share of good samples after an arm, its paired gain over `before`, and the mean of every measure."""
    return {
        "good": int(after.good.sum()),
        "share": intervals.share(after.good),
        **intervals.paired_changes(before.good, after.good),
        "means": {name: _mean(values) for name, values in after.measures().items()},
    }


def _mean(values: Tensor) -> intervals.Estimate:
    """The mean of a measure, whose interval ends at 0 as no measure is negative."""
    value, low, high = intervals.mean(values)
    return intervals.Estimate(value, max(0.0, low), high)
