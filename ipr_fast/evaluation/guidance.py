"""Methods that use a reward, at equal model calls: best of N, refinement with acceptance, and guided generation.

The reward is minus the violations of a board, by the judge that also counts the valid ones. Every arm has chains
0..B-1, one seed and the same clues. A budget is a multiple of the model calls of one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.experiments import compare, described
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.acceptance import Metropolis
from ipr_fast.sampling.guidance.generation import Guidance
from ipr_fast.sampling.guidance.iterref import IterRef
from ipr_fast.sampling.guidance.steering import Steering
from ipr_fast.sampling.guidance.svdd import SVDD
from ipr_fast.sampling.policies import num_chosen, random_patches
from ipr_fast.spaces import space_of
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import BoardReport, DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku

ALPHA = 0.25
LEVELS = (0.5, 0.25, 0.0)  # of IterRef and, but for 0, of FK steering


@dataclass(frozen=True)
class GuidanceSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board, uniform in clues[0]..clues[1]. budgets: multiples of one pass, ascending, the first 1.
    temperature: of Metropolis' rule, IterRef and FK steering, in violations.
    """

    count: int = 2000
    clues: tuple[int, int] = (0, 0)
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16)
    temperature: float = 0.5
    seed: int = 0


class Cells:
    """The cells of a table: the report of each arm at each budget, with its mean calls a board."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, tuple[BoardReport, float, float]]] = {}

    def add(self, arm: str, budget: int, report: BoardReport, model_calls: float, reward_calls: float) -> None:
        self.found.setdefault(arm, {})[budget] = report, model_calls, reward_calls

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows, ready for JSON: each cell compared with best of N at its budget."""
        rivals = self.found["best of N"]
        return [
            {
                "name": arm,
                "cells": [
                    {"budget": at, "calls": calls, "reward_calls": asked, **compare(rivals[at][0], report)}
                    for at, (report, calls, asked) in cells.items()
                ],
            }
            for arm, cells in self.found.items()
        ]


class GuidanceExperiment:
    """Runs arms on B chains of a model of boards."""

    def __init__(
        self,
        task: DigitSudoku | TokenSudoku,
        model: Denoiser | TokenDenoiser,
        settings: GuidanceSettings,
        progress: bool = False,
    ) -> None:
        self.model, self.settings, self.judge = model, settings, task.judge()
        self.options: dict[str, Any] = {"model": model, "seed": settings.seed, "progress": progress}
        cells, clues = task.side**2, draw_clues(task, settings.count, settings.clues, settings.seed)
        free = torch.full((settings.count,), cells, device="cpu")
        self.given: dict[str, Any] = {}
        if clues is not None:
            device = contract.device_of(model) or torch.device("cpu")
            self.given = {"known": clues[0].to(device), "known_values": clues[1].to(device)}
            free = (~clues[0]).sum(1)
        self.pass_calls = self._mean_steps("generate_schedule", free.tolist())
        self.iteration_calls = self._mean_steps("refine_schedule", [num_chosen(ALPHA, n) for n in free.tolist()])

    def _mean_steps(self, schedule: str, active: list[int]) -> float:
        sampling = space_of(self.model).sampling(None, schedule, 0.5, 1.0, 0, "random")
        return sum(map(sampling.num_steps, active)) / len(active)

    def reward(self, x: Tensor) -> Tensor:
        return -self.judge(x).violations.double()

    def generate(self, sample: int = 0, guidance: Guidance | None = None) -> Tensor:
        """Generate a board of each chain; sample: which of its independent ones."""
        count = self.settings.count
        ids = torch.arange(sample * count, (sample + 1) * count, device=contract.device_of(self.model))
        return generate_batch(count, chain_ids=ids, guidance=guidance, **self.given, **self.options)

    def best_of_n(self, cells: Cells) -> Tensor:
        """Add the best of as many samples as the budget has passes; return the first ones."""
        first = best = self.generate()
        reports = {1: self.judge(best)}
        for sample in range(1, self.settings.budgets[-1]):
            x = self.generate(sample)
            better = self.reward(x) > self.reward(best)
            best = torch.where(better.view(-1, *(1,) * (x.ndim - 1)), x, best)
            reports[sample + 1] = self.judge(best)
        for budget in self.settings.budgets:
            cells.add("best of N", budget, reports[budget], budget * self.pass_calls, budget)
        return first

    def refined(self, cells: Cells, arm: str, start: Tensor, accept: Metropolis | None, best: bool = False) -> None:
        """Add one pass and as many iterations as the budget has calls left. best: of each chain's best board so far."""
        at = {int((budget - 1) * self.pass_calls / self.iteration_calls): budget for budget in self.settings.budgets}
        held = self.judge(start)

        def note(iteration: int, x: Tensor) -> None:
            nonlocal held
            report = self.judge(x)
            if best:
                better = report.violations < held.violations
                pairs = zip(report, held, strict=True)
                report = BoardReport(*(torch.where(better.view(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in pairs))
            held = report
            if iteration in at:
                calls = self.pass_calls + iteration * self.iteration_calls
                cells.add(arm, at[iteration], report, calls, 1 + iteration if best or accept is not None else 0)

        note(0, start)
        known: dict[str, Any] = {name: self.given[name] for name in self.given if name == "known"}
        refine_batch(start, random_patches(ALPHA), max(at), callback=note, accept=accept, **known, **self.options)

    def guided(self, cells: Cells, arm: str, budget: int, guidance: Guidance) -> None:
        """Add a generation toward the reward."""
        x = self.generate(0, guidance)
        last: Any = guidance.last  # type: ignore[attr-defined]
        cost = getattr(last, "cost", last)
        calls, asked = (float(each.double().mean()) for each in cost)
        cells.add(arm, budget, self.judge(x), calls, asked)


def guidances(calls: float, budget: int, reward: Callable[[Tensor], Tensor], temperature: float) -> dict[str, Guidance]:
    """Return methods by arm that take at most `budget` times the model calls of one pass, where they can.

    A move of IterRef takes two calls, one at level 0; a particle one more a level; a step of SVDD two a candidate.
    """
    extra = len(LEVELS) - 1  # levels whose states are completed
    moves = int(((budget - 1) * calls - extra) / (2 * extra + 1))
    particles, candidates = int(budget * calls / (calls + extra)), int(budget * calls / (2 * calls - 1))
    found: dict[str, Guidance] = {}
    if moves >= 1:
        found[f"IterRef, T = {temperature:g}"] = IterRef(reward, temperature, LEVELS, moves)
    if particles >= 2:
        levels = tuple(level for level in LEVELS if level)
        found[f"FK steering, T = {temperature:g}"] = Steering(reward, temperature, particles, levels)
    if candidates >= 2:
        found["SVDD"] = SVDD(reward, 0.0, candidates)
    return found


def run_guidance_experiment(
    task: KnownTask,
    model: Denoiser | TokenDenoiser,
    name: str,
    settings: GuidanceSettings,
    *,
    progress: bool = False,
) -> dict:
    """Measure valid boards by method and budget; return rows ready for JSON, each cell compared with best of N.

    name: of the model, for the record. IterRef, FK steering and SVDD are measured on tokens only. Raises ValueError for
    a task without boards.
    """
    if not isinstance(task, (DigitSudoku, TokenSudoku)):
        raise ValueError(f"model: guidance is measured on boards of digits, got a model of {task.name}")
    experiment, cells, temperature = GuidanceExperiment(task, model, settings, progress), Cells(), settings.temperature
    reward = experiment.reward
    start = experiment.best_of_n(cells)
    experiment.refined(cells, "IPR", start, None)
    experiment.refined(cells, "IPR, best so far", start, None, best=True)
    experiment.refined(cells, "IPR, greedy", start, Metropolis(reward))
    accept = Metropolis(reward, temperature)
    experiment.refined(cells, f"IPR, Metropolis, T = {temperature:g}, best so far", start, accept, best=True)
    if isinstance(model, TokenDenoiser):
        for budget in settings.budgets:
            for arm, guidance in guidances(experiment.pass_calls, budget, reward, temperature).items():
                experiment.guided(cells, arm, budget, guidance)
    return {
        **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
        "multiples": settings.budgets,
        "pass_calls": experiment.pass_calls,
        "temperature": temperature,
        "rows": cells.rows(),
        "environment": environment.describe(contract.device_of(model) or torch.device("cpu")),
    }
