"""Experiments on a model: one pass, IPR and controls on the same chains, compared sample by sample.

Every arm generates or refines chains 0..B-1 with one seed, so its gain over one pass is paired.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.evaluation import environment, intervals
from ipr_fast.evaluation.arms import Arm, Chains, Given
from ipr_fast.evaluation.evaluate import draw_clues, many
from ipr_fast.evaluation.report import SHOWN_ITERATIONS
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.spaces import DEFAULT_GENERATE_SCHEDULE, DEFAULT_REFINE_SCHEDULE
from ipr_fast.tasks.base import Report
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import DigitSudoku, clues_kept

ONE_PASS = Arm("one pass")
OTHER_ALPHAS = (0.1, 0.5)
COMPARED = 20
ARMS = ("alphas", "fixed", "controls", "clues")  # optional; one pass and alpha 0.25 are always measured


@dataclass(frozen=True)
class ExperimentSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board, in digit images that no model has seen; each board's number is uniform in
    clues[0]..clues[1]. iters: iterations of IPR at alpha 0.25. compared: iterations of the other arms; None: 20, or
    iters where that is less. arms: of ARMS.
    """

    count: int = 2048
    clues: tuple[int, int] = (0, 0)
    iters: int = 50
    compared: int | None = None
    arms: tuple[str, ...] = ARMS
    seed: int = 0

    @property
    def compared_iters(self) -> int:
        return min(COMPARED, self.iters) if self.compared is None else self.compared


class Cost(NamedTuple):
    """Mean cost of a sample: calls, the NFE; evaluations, the patches computed in those calls."""

    calls: float
    evaluations: float


class Experiment:
    """Runs arms on B chains of a model; `before` holds the judge's report on their one pass.

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
        clues = draw_clues(task, settings.count, settings.clues, settings.seed)
        ids = torch.arange(settings.count, device="cpu")
        self.given = None if clues is None else Given(*clues)
        self.chains = Chains(model, self.judge, ids, seed=settings.seed, given=self.given, progress=progress)
        self.one_pass, self.before = self.chains.start(ONE_PASS)

    def reports(self, arm: Arm) -> list[Report]:
        """Return the judge's reports after 0..iterations iterations; check that clues keep their bits."""
        reports: list[Report] = []

        def judged(_: int, x: Tensor, report: Report) -> None:
            reports.append(report)
            if self.chains.given is not None and isinstance(self.task, DigitSudoku):
                kept = clues_kept(x, self.chains.given.known, self.one_pass, self.task.side)
                if not kept.all():
                    raise AssertionError("refinement has changed a clue cell")

        self.chains.follow(arm, judged)
        return reports

    def row(self, name: str, arm: Arm, report: Report, iteration: int) -> dict:
        """Return one row of the table: an arm's cost after an iteration, and its comparison with one pass."""
        calls, evaluations = map(round, self.cost(arm, iteration))
        return {"name": name, "calls": calls, "evaluations": evaluations, **compare(self.before, report)}

    def cost(self, arm: Arm, iteration: int) -> Cost:
        """Return the mean cost of a sample after an iteration."""
        calls, evaluations, _ = self.chains.costs(arm, iteration)
        return Cost(calls.double().mean().item(), evaluations.double().mean().item())

    # ------------------------------------------------------------------------------------------------- the arms

    def refinement(
        self, alpha: float, shown: tuple[int, ...], variant: str = "", *, fixed: bool = False, noise: str = "random"
    ) -> tuple[list[dict], list[int]]:
        """IPR at one alpha: rows after the iterations `shown`, and the number of good samples after each iteration."""
        name = f"IPR, alpha {alpha:g}{variant}"
        arm = Arm(name, max(shown), "fixed" if fixed else "random", ratio=alpha, noise=noise)
        reports = self.reports(arm)
        rows = [self.row(f"{name}, {many(r, 'iteration')}", arm, reports[r], r) for r in shown]
        return rows, [int(report.good.sum()) for report in reports]

    def controls(self, calls: int) -> list[dict]:
        """Spend about `calls` NFE on one longer pass, and on renoising everything."""
        once, own = self.cost(ONE_PASS, 0).calls, self.generate_schedule
        steps, times = round(own.steps_per_patch * calls / once), max(1, round((calls - once) / once))
        repeated = "once" if times == 1 else f"{times} times"
        longer = Arm(f"one pass, {steps} steps a patch", generate=_arguments(replace(own, steps_per_patch=steps)))
        again = Arm(f"renoise everything {repeated}", times, "all", refine=_arguments(own))
        return [self.row(arm.name, arm, self.reports(arm)[-1], arm.iterations) for arm in (longer, again)]

    def clue_arms(self) -> list[dict]:
        """One pass and IPR with 0 to N/2 clues a board."""
        high, compared = self.num_patches // 2, self.settings.compared_iters
        clued = Experiment(self.task, self.model, replace(self.settings, clues=(0, high)), self.progress)
        arms = ONE_PASS, Arm(f"IPR, alpha 0.25, {compared} iterations", compared)
        return [
            {"name": f"0 to {high} clues: {arm.name}", **compare(clued.before, clued.reports(arm)[-1])} for arm in arms
        ]


def _arguments(schedule: Schedule) -> dict:
    return {field.name: getattr(schedule, field.name) for field in fields(schedule)}


def run_experiment(
    task: KnownTask, model: Denoiser, name: str, settings: ExperimentSettings, *, progress: bool = False
) -> dict:
    """Run one pass, IPR at alpha 0.25 and the chosen arms; return the measurement, ready for JSON.

    name: of the model, for the record. `report.experiment_table` makes a table of the result.
    """
    experiment, compared, arms = Experiment(task, model, settings, progress), settings.compared_iters, settings.arms
    shown = tuple(sorted({r for r in SHOWN_ITERATIONS if r < settings.iters} | {settings.iters, compared}))
    rows, good_by_iteration = experiment.refinement(0.25, shown)
    calls = rows[shown.index(compared)]["calls"]
    rows.insert(0, experiment.row(ONE_PASS.name, ONE_PASS, experiment.before, 0))
    if "alphas" in arms:
        for alpha in OTHER_ALPHAS:
            rows += experiment.refinement(alpha, (compared,))[0]
    if "fixed" in arms:
        rows += experiment.refinement(0.25, (compared,), ", same region", fixed=True)[0]
        rows += experiment.refinement(0.25, (compared,), ", same noise", noise="fixed")[0]
    if "controls" in arms:
        rows += experiment.controls(calls)
    if "clues" in arms and isinstance(task, DigitSudoku) and experiment.given is None:
        rows += experiment.clue_arms()
    generate, refine = experiment.generate_schedule, experiment.refine_schedule
    return {
        **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
        "generate_schedule": list(generate.values),
        "refine_schedule": list(refine.values),
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
        "means": {name: intervals.mean(values) for name, values in after.measures().items()},
    }
