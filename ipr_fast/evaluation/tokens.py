"""Experiments on a model of tokens: methods of making boards, with equal numbers of model calls.

Every cell, a method with a budget, has chains 0..B-1, one seed and the same clues, so cells are compared board by
board. They are made in parts of the chains, the first part of every cell first: a measurement that is stopped later
has all its cells, each with the boards made until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.experiments import Cost, compare, described
from ipr_fast.evaluation.kept import KeptTokens
from ipr_fast.evaluation.token_methods import RIVAL, Method, methods
from ipr_fast.models import contract
from ipr_fast.models.files.content_hash import model_hash
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import num_chosen, random_patches
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.tasks.sudoku import BoardReport
from ipr_fast.tasks.token_sudoku import TokenSudoku

BOARDS_AT_ONCE = 32  # on a CPU: 12 % faster than 123 with 0 to 26 clues, as boards of a wave have about as many


@dataclass(frozen=True)
class TokenExperimentSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board; each board's number is uniform in clues[0]..clues[1]. budgets: model calls of a board,
    each at least 2. part: the chains of a piece of work.
    """

    count: int = 2000
    clues: tuple[int, int] = (0, 26)
    budgets: tuple[int, ...] = (81, 40, 20, 10, 5)
    part: int = 500
    seed: int = 0


class TokenExperiment:
    """Makes boards of B chains by methods, a part of the chains at a time, and keeps them."""

    def __init__(
        self,
        task: TokenSudoku,
        model: TokenDenoiser,
        settings: TokenExperimentSettings,
        progress: bool = False,
        folder: Path | None = None,
        name: str = "",
    ) -> None:
        self.model, self.settings, self.judge, self.progress = model, settings, task.judge(), progress
        self.device = contract.device_of(model) or torch.device("cpu")
        clues = draw_clues(task, settings.count, settings.clues, settings.seed)
        self.known: Tensor | None = None
        self.values: Tensor | None = None
        if clues is not None:
            self.known, self.values = (each.to(self.device) for each in clues)
        self.length, self.methods = task.length, methods(task.length)
        self.free = [task.length] * settings.count if self.known is None else (~self.known).sum(1).tolist()
        run = {"model": name, "weights": model_hash(model, name), "clues": settings.clues, "seed": settings.seed}
        self.kept = KeptTokens(folder, {**run, "samples": settings.count, "part": settings.part})

    @property
    def parts(self) -> range:
        return range(-(-self.settings.count // self.settings.part))

    def method(self, name: str, budget: int) -> Method | None:
        return self.methods[name](budget)

    def boards(self, name: str, budget: int, part: int) -> Tensor:
        """Return the boards (b, N) of a part of a cell, on the CPU."""
        shape, size = (len(self._chains(part)), self.length), self.model.vocabulary.size
        return self.kept.get(_piece(name, budget, part), shape, size, lambda: self._make(name, budget, part))

    def reports(self, name: str, budget: int) -> BoardReport | None:
        """Judge the boards of a cell that are there, from the first on; None if there are none."""
        there = []
        for part in self.parts:
            if not self.kept.has(_piece(name, budget, part)):
                break
            there.append(self.boards(name, budget, part))
        return self.judge(torch.cat(there)) if there else None

    def cost(self, method: Method, boards: int) -> Cost:
        """Return the mean cost of the first `boards` boards.

        A regeneration computes all N positions once to prepare the context, and in each call the active ones.
        """
        calls = evaluations = 0
        for schedule, ratio, times in method.regenerations:
            for free in self.free[:boards]:
                active = num_chosen(ratio, free)
                made = schedule.num_steps(active)
                calls += times * made
                evaluations += times * (self.length + made * active)
        return Cost(calls / boards, evaluations / boards)

    def _make(self, name: str, budget: int, part: int) -> Tensor:
        method = self.method(name, budget)
        assert method is not None, "a cell has a method"
        if method.then is None and method.samples == 1:
            return self._pass(method.first, part)
        assert method.first.steps is not None
        x = self.boards(RIVAL, method.first.steps, part)  # kept, since methods share it
        for sample in range(1, method.samples):
            other = self._pass(method.first, part, sample)
            better = self.judge(other.cpu()).violations < self.judge(x).violations
            x = torch.where(better[:, None], other.cpu(), x)
        return x if method.then is None else self._refined(x, method.then, part)

    def _pass(self, schedule: TokenSchedule, part: int, sample: int = 0) -> Tensor:
        """Generate the boards of a part. sample: which of the independent ones of each chain."""
        own = self._chains(part)
        return generate_batch(
            len(own),
            known=self._of(self.known, own),
            known_values=self._of(self.values, own),
            chain_ids=self._ids(own) + sample * self.settings.count,
            **self._options(schedule),
        )

    def _refined(self, x: Tensor, iterations: tuple[TokenSchedule, float, int], part: int) -> Tensor:
        schedule, ratio, times = iterations
        own = self._chains(part)
        return refine_batch(
            x.to(self.device),
            random_patches(ratio),
            times,
            known=self._of(self.known, own),
            chain_ids=self._ids(own),
            **self._options(schedule),
        )

    def _options(self, schedule: TokenSchedule) -> dict[str, Any]:
        at_once = BOARDS_AT_ONCE if self.device.type == "cpu" else "auto"
        common = {"seed": self.settings.seed, "progress": self.progress, "max_chains": at_once}
        return {"model": self.model, "schedule": schedule, **common}

    def _chains(self, part: int) -> range:
        return range(self.settings.count)[part * self.settings.part : (part + 1) * self.settings.part]

    def _ids(self, own: range) -> Tensor:
        return torch.arange(own.start, own.stop, device=self.device)

    @staticmethod
    def _of(values: Tensor | None, own: range) -> Tensor | None:
        return None if values is None else values[own.start : own.stop]


def run_token_experiment(
    task: TokenSudoku,
    model: TokenDenoiser,
    name: str,
    settings: TokenExperimentSettings,
    *,
    progress: bool = False,
    folder: Path | None = None,
    found: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Measure every method at each budget; return rows ready for JSON.

    name: of the model, for the record. folder: keeps the boards made, so that a stopped measurement goes on from them.
    found: called with the results so far after each piece of work. A cell has its number of boards, mean cost, and
    paired gain over one pass in the order "confidence" with the same budget.
    """
    if min(settings.budgets) < 2:
        raise ValueError(f"budgets must be at least 2 calls, got {min(settings.budgets)}")
    experiment = TokenExperiment(task, model, settings, progress, folder, name)
    for arm, budget, part in work(experiment):
        if experiment.kept.has(_piece(arm, budget, part)):
            continue
        experiment.boards(arm, budget, part)
        found(results_of(experiment, task, name))
    return results_of(experiment, task, name)


def work(experiment: TokenExperiment) -> Iterator[tuple[str, int, int]]:
    """Yield the pieces of work: method, budget and part.

    The first part of all cells comes first, in columns of growing budgets; then the other parts of each method in turn,
    the largest budget last.
    """
    *budgets, most = sorted(experiment.settings.budgets)
    later = experiment.parts[1:]
    pieces = [
        *((name, budget, 0) for budget in (*budgets, most) for name in experiment.methods),
        *((name, budget, part) for name in experiment.methods for part in later for budget in budgets),
        *((name, most, part) for name in experiment.methods for part in later),
    ]
    yield from (piece for piece in pieces if experiment.method(*piece[:2]) is not None)


def results_of(experiment: TokenExperiment, task: TokenSudoku, name: str) -> dict:
    """Return the rows of the boards that are there, ready for JSON."""
    settings = experiment.settings
    rivals = {budget: experiment.reports(RIVAL, budget) for budget in settings.budgets}
    rows = []
    for arm in experiment.methods:
        cells = [
            {"budget": budget, **cell}
            for budget in settings.budgets
            if (cell := _cell(experiment, arm, budget, rivals[budget])) is not None
        ]
        rows += [{"name": arm, "cells": cells}] if cells else []
    return {
        **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
        "budgets": settings.budgets,
        "rival": RIVAL,
        "rows": rows,
        "environment": environment.describe(experiment.device),
    }


def _cell(experiment: TokenExperiment, arm: str, budget: int, rival: BoardReport | None) -> dict[str, Any] | None:
    report, method = experiment.reports(arm, budget), experiment.method(arm, budget)
    if report is None or method is None or rival is None:
        return None
    boards = min(len(report.valid), len(rival.valid))
    ours, theirs = (BoardReport(*(each[:boards] for each in of)) for of in (report, rival))
    return {"boards": boards, **experiment.cost(method, boards)._asdict(), **compare(theirs, ours)}


def _piece(arm: str, budget: int, part: int) -> str:
    return f"{arm}, {budget} calls, {part}"
