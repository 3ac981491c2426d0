"""Evaluate a model: generate samples, refine them, judge them after every iteration, and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import intervals
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.tasks.base import Judge, Report, Task
from ipr_fast.tasks.catalog import KnownTask, task_of, task_of_tokens
from ipr_fast.tasks.grids import random_grids
from ipr_fast.tasks.sudoku import DigitSudoku, draw_boards, random_clues
from ipr_fast.tasks.token_sudoku import TokenSudoku


@dataclass(frozen=True)
class Trajectory:
    """A judge's reports on B chains: after the first pass, and after each of R iterations."""

    reports: list[Report]  # R + 1

    @property
    def good(self) -> Tensor:
        """(R + 1, B) bool, on the CPU."""
        return torch.stack([report.good for report in self.reports]).cpu()

    def measures(self) -> dict[str, Tensor]:
        """Every measure of the reports, (R + 1, B), on the CPU."""
        each = [report.measures() for report in self.reports]
        return {name: torch.stack([measures[name] for measures in each]).cpu() for name in each[0]}


def follow(
    model: Denoiser | TokenDenoiser,
    judge: Judge,
    count: int,
    iters: int,
    *,
    ratio: float = 0.25,
    seed: int = 0,
    known: Tensor | None = None,
    known_values: Tensor | None = None,
    start: Tensor | None = None,
    schedule: TokenSchedule | Schedule | None = None,
    progress: bool = False,
    watch: Callable[[Tensor], None] = lambda samples: None,
) -> Trajectory:
    """Generate samples, refine them with `random_patches(ratio)`, and return the judge's report of every iteration.

    count: B. start (B, ...): samples to refine, in place of generated ones. schedule: of both, if not the model's own.
    known (B, N) bool and known_values (B, ...): clues, on any device.
    watch: called with the samples (B, ...), on the model's device, after the first pass and after each iteration.
    """
    device = contract.device_of(model) or torch.device("cpu")
    known, known_values = (None if each is None else each.to(device) for each in (known, known_values))
    reports: list[Report] = []

    def judge_iteration(_: int, samples: Tensor) -> None:
        watch(samples)
        reports.append(judge(samples))

    common: dict[str, Any] = {
        "model": model,
        "known": known,
        "seed": seed,
        "schedule": schedule,
        "progress": progress,
    }
    x = generate_batch(count, known_values=known_values, **common) if start is None else start.to(device)
    judge_iteration(0, x)
    refine_batch(x, random_patches(ratio), iters, callback=judge_iteration, **common)
    return Trajectory(reports)


def task_for(model: Denoiser | TokenDenoiser, mnist: str | None = None) -> KnownTask:
    """Make the task whose samples a model makes. mnist: as for `make_task`. Raises ValueError if there is none."""
    if isinstance(model, TokenDenoiser):
        if mnist is not None:
            raise ValueError("mnist: a model of tokens has no digit images")
        return task_of_tokens(model.vocabulary, model.length)
    return task_of(model.grid, mnist)


def draw_clues(task: KnownTask, boards: int, clues: tuple[int, int], seed: int) -> tuple[Tensor, Tensor] | None:
    """Draw clues (known (B, N), known_values (B, ...)) from random valid boards, of images in held-out digits.

    clues: each board's number of clues is uniform in clues[0]..clues[1]. Returns None for (0, 0); raises ValueError for
    clues of a task without clues.
    """
    if clues == (0, 0):
        return None
    if not isinstance(task, (DigitSudoku, TokenSudoku)):
        raise ValueError(f"clues: {task.name} has none, got {clues[0]} to {clues[1]}")
    generator = torch.Generator("cpu").manual_seed(seed)
    grids = random_grids(boards, task.side, generator)
    values = grids.flatten(1) if isinstance(task, TokenSudoku) else draw_boards(grids, task.test, generator)
    return random_clues(boards, task.side, *clues, generator), values


def evaluate(
    task: Task, model: Denoiser | TokenDenoiser, count: int, iters: int, *, seed: int = 0, progress: bool = False
) -> dict:
    """Generate and refine `count` samples of a model of the task; return the counts and intervals of `summarise`."""
    return summarise(follow(model, task.judge(), count, iters, seed=seed, progress=progress), task)


def summarise(trajectory: Trajectory, task: Task) -> dict[str, Any]:
    """Return counts, intervals and means, ready for JSON."""
    good = trajectory.good
    before, after = good[0], good[-1]
    return {
        f"{task.noun}s": len(before),
        f"{task.adjective}_before": int(before.sum()),
        f"{task.adjective}_after": int(after.sum()),
        "share_before": intervals.share(before),
        "share_after": intervals.share(after),
        **intervals.paired_changes(before, after),
        f"{task.adjective}_by_iteration": good.sum(1).tolist(),
        **{
            f"mean_{name}_by_iteration": values.double().mean(1).tolist()
            for name, values in trajectory.measures().items()
        },
    }


def describe(results: dict[str, Any], task: Task, iters: int, start: str = "after one pass") -> list[str]:
    """Format the results of `summarise` as lines for a person. start: what the samples were before refinement."""
    n, word = results[f"{task.noun}s"], task.adjective
    before, after = results[f"{word}_before"], results[f"{word}_after"]
    means = {name: values for name, values in results.items() if name.startswith("mean_")}
    return [
        f"  {start:22}{before:5d} of {n} {word}   {results['share_before'].percent()}",
        f"  {'after ' + many(iters, 'iteration'):22}{after:5d} of {n} {word}   {results['share_after'].percent()}",
        f"  {'gain':22} {results['gain'].points()}   (paired; intervals are 95 %)",
        f"  {many(results['fixed'], task.noun)} fixed, {results['broken']} broken",
        *(
            f"  {_title(name):22} {values[0]:.3g} before, {values[-1]:.3g} after, on average"
            for name, values in means.items()
        ),
    ]


def many(count: int, noun: str) -> str:
    """Return the count and the noun, in the plural unless the count is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _title(name: str) -> str:
    return name.removeprefix("mean_").removesuffix("_by_iteration").replace("_", " ").replace("std", "deviation")
