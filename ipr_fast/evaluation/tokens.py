"""Experiments on a model of tokens: the order in which a pass reveals them, and refinement with as many model calls.

Every arm has chains 0..B-1, one seed and the same clues, so arms are compared sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.experiments import Cost, compare, described
from ipr_fast.models import contract
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import num_chosen, random_patches
from ipr_fast.sampling.tokens import ORDERS, TokenSchedule
from ipr_fast.tasks.token_sudoku import TokenSudoku

ALPHAS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class TokenExperimentSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board; each board's number is uniform in clues[0]..clues[1]. budgets: model calls of a board.
    """

    count: int = 2000
    clues: tuple[int, int] = (0, 26)
    budgets: tuple[int, ...] = (81, 40, 20, 10, 5)
    seed: int = 0


class TokenExperiment:
    """Runs arms on B chains of a model of boards."""

    def __init__(
        self, task: TokenSudoku, model: TokenDenoiser, settings: TokenExperimentSettings, progress: bool = False
    ) -> None:
        self.model, self.settings, self.judge, self.progress = model, settings, task.judge(), progress
        device = contract.device_of(model) or torch.device("cpu")
        clues = draw_clues(task, settings.count, settings.clues, settings.seed)
        self.known: Tensor | None = None
        self.values: Tensor | None = None
        if clues is not None:
            self.known, self.values = (each.to(device) for each in clues)
        self.length, self._passes = task.length, dict[tuple[int, str], Tensor]()
        self.free = [task.length] * settings.count if self.known is None else (~self.known).sum(1).tolist()

    def one_pass(self, calls: int, order: str) -> Tensor:
        """Return boards (B, N) of one pass with so many calls."""
        if (calls, order) not in self._passes:
            self._passes[calls, order] = generate_batch(
                self.settings.count,
                model=self.model,
                known=self.known,
                known_values=self.values,
                schedule=TokenSchedule(calls, order=order),
                seed=self.settings.seed,
                progress=self.progress,
            )
        return self._passes[calls, order]

    def refined(self, x: Tensor, plan: RefinementPlan, alpha: float, order: str) -> Tensor:
        """Return boards (B, N) after the plan's iterations."""
        return refine_batch(
            x,
            random_patches(alpha),
            plan.iterations,
            model=self.model,
            known=self.known,
            schedule=TokenSchedule(plan.calls, order=order),
            seed=self.settings.seed,
            progress=self.progress,
        )

    def cost(self, calls: int, alpha: float | None = None, times: int = 1) -> Cost:
        """Return the mean cost of `times` regenerations of all free positions, or of a share alpha, by `calls` calls.

        `prepare` computes all N positions once; a call computes the active ones.
        """
        active = self.free if alpha is None else [num_chosen(alpha, free) for free in self.free]
        made = [(min(calls, count), count) for count in active]
        evaluations = [self.length + each * count for each, count in made]
        return Cost(times * sum(each for each, _ in made) / len(made), times * sum(evaluations) / len(made))


@dataclass(frozen=True)
class RefinementPlan:
    """A budget of calls of a board: `first` for the pass, `calls` for each of the iterations."""

    first: int
    calls: int
    iterations: int

    @classmethod
    def of(cls, budget: int) -> RefinementPlan:
        """Spend half of the budget on the pass and a tenth on each iteration."""
        first, calls = budget // 2, max(1, budget // 10)
        return cls(first, calls, (budget - first) // calls)


def run_token_experiment(
    task: TokenSudoku, model: TokenDenoiser, name: str, settings: TokenExperimentSettings, *, progress: bool = False
) -> dict:
    """Measure one pass by each order, and IPR in the order "confidence", at each budget; return rows ready for JSON.

    name: of the model, for the record. A cell has its mean cost, and its paired gain: of a pass over the random order,
    of IPR over one pass by confidence, each at the same budget.
    """
    experiment = TokenExperiment(task, model, settings, progress)
    rows: dict[str, list[dict[str, Any]]] = {}
    for budget in settings.budgets:
        passes = {order: experiment.judge(experiment.one_pass(budget, order)) for order in ORDERS}
        for order, report in passes.items():
            cell = {"budget": budget, **experiment.cost(budget)._asdict(), **compare(passes["random"], report)}
            rows.setdefault(f"one pass, {order}", []).append(cell)
        plan = RefinementPlan.of(budget)
        start = experiment.one_pass(plan.first, "confidence")
        for alpha in ALPHAS:
            report = experiment.judge(experiment.refined(start, plan, alpha, "confidence"))
            costs = experiment.cost(plan.first), experiment.cost(plan.calls, alpha, plan.iterations)
            cost = {name: sum(each) for name, each in zip(Cost._fields, zip(*costs, strict=True), strict=True)}
            cell = {"budget": budget, **cost, "plan": vars(plan), **compare(passes["confidence"], report)}
            rows.setdefault(f"confidence and IPR, alpha {alpha:g}", []).append(cell)
    return {
        **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
        "budgets": settings.budgets,
        "rows": [{"name": arm, "cells": cells} for arm, cells in rows.items()],
        "environment": environment.describe(contract.device_of(model) or torch.device("cpu")),
    }
