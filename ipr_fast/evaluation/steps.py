"""Steps: what the model calls inside an iteration buy, right samples or real-looking patches.

Arms refine the same samples of one pass by other schedules. What is right is the judge's to say; how real the patches
look is the Fréchet distance between Gaussians fitted to their pixels and to those of the task's data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.evaluation.evaluate import draw_clues, many
from ipr_fast.evaluation.experiments import compare, described
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.patches import Grid
from ipr_fast.sampling.policies import MaskPolicy, random_patches, sizes_chosen, sweep_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.spaces import regeneration_calls, space_of
from ipr_fast.tasks.catalog import KnownTask

ALPHA = 0.25
COARSE = {"3 steps": Schedule(3, 1.0), "2 steps": Schedule(2, 1.0), "1 step": Schedule(1, 1.0)}  # all patches at once
POLISH = Schedule(10, 1.0)
BATCH = 1024  # samples of data at a time


@dataclass(frozen=True)
class Stage:
    """Iterations of one arm: how many, of which patches, by which schedule; None for the model's."""

    iterations: int
    policy: MaskPolicy
    schedule: Schedule | None


class StepsExperiment:
    """Refines the samples of one pass of `count` chains by several schedules.

    Raises ValueError for clues of a task without clues, and for fewer than two free patches.
    """

    def __init__(
        self, task: KnownTask, model: Denoiser, count: int, clues: tuple[int, int], seed: int, progress: bool
    ) -> None:
        self.task, self.model, self.judge, self.count, self.seed = task, model, task.judge(), count, seed
        self.space, self.device = space_of(model), contract.device_of(model) or torch.device("cpu")
        self.grid: Grid = model.grid
        given = draw_clues(task, count, clues, seed)
        self.free = torch.ones(count, self.grid.num_patches, dtype=torch.bool, device="cpu")
        self.known: Tensor | None = None
        values = None
        if given is not None:
            self.free, self.known, values = ~given[0], given[0].to(self.device), given[1].to(self.device)
        free = int(self.free.sum())
        if free < 2:
            raise ValueError(f"clues must leave two cells to generate, got {free} in {many(count, 'sample')}")
        counts = self.free.sum(1)
        self.chosen = sizes_chosen(ALPHA, self.grid.num_patches, "cpu")[counts]
        # The iterations in which `sweep_patches` has chosen every free patch of every chain.
        self.sweep = int((counts / self.chosen.clamp_min(1)).ceil().max())
        self.options: dict[str, Any] = {"model": model, "known": self.known, "progress": progress}
        self.start = generate_batch(count, known_values=values, seed=seed, **self.options)
        self.pass_calls = float(regeneration_calls(self.space, None, "generate_schedule", counts).double().mean())
        self.before = self.judge(self.start)
        self.data = fit(self._data_patches(seed + 1))

    def iteration_calls(self, schedule: Schedule | None) -> float:
        """Return the mean model calls of an iteration."""
        return float(regeneration_calls(self.space, schedule, "refine_schedule", self.chosen).double().mean())

    def row(self, name: str, stages: list[Stage]) -> dict:
        """Refine by the stages, each with random numbers of its own, and return the arm's row."""
        x, calls = self.start, self.pass_calls
        for number, stage in enumerate(stages):
            seed = (self.seed + number) % 2**64
            x = refine_batch(x, stage.policy, stage.iterations, schedule=stage.schedule, seed=seed, **self.options)
            calls += stage.iterations * self.iteration_calls(stage.schedule)
        patches = self.grid.to_patches(x.cpu())[self.free]
        return {
            "name": name,
            "iterations": sum(stage.iterations for stage in stages),
            "calls": calls,
            "distance": frechet_distance(fit(patches), self.data),
            **compare(self.before, self.judge(x)),
        }

    def data_distance(self) -> float:
        """Return the distance of as many other patches of the data: what samples from the data's law would have."""
        return frechet_distance(fit(self._data_patches(self.seed + 2)), self.data)

    def _data_patches(self, seed: int) -> Tensor:
        """Return patches (n, P) of the task's data, those that are free in the chains."""
        generator, parts = torch.Generator("cpu").manual_seed(seed % 2**63), []
        for free in self.free.split(BATCH):
            parts.append(self.grid.to_patches(self.task.sample(len(free), generator))[free])
        return torch.cat(parts)


def measure_steps(
    task: KnownTask,
    model: Denoiser,
    name: str,
    count: int,
    iters: int = 20,
    clues: tuple[int, int] = (0, 0),
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Refine samples by `iters` iterations of the model's schedule and of shorter ones; return rows ready for JSON.

    Every coarse arm is measured as it is and with a sweep of fine iterations after it; the sweep alone is a control.
    The last row has the model's schedule again, for the fewest iterations that take as many calls as any of those.

    name: of the model, for the record.
    """
    experiment = StepsExperiment(task, model, count, clues, seed, progress)
    random, sweep = random_patches(ALPHA), Stage(experiment.sweep, sweep_patches(ALPHA), POLISH)
    rows = [
        experiment.row("one pass", []),
        experiment.row("the model's schedule", [Stage(iters, random, None)]),
        experiment.row("a sweep of 10", [sweep]),
    ]
    for words, schedule in COARSE.items():
        stage = Stage(iters, random, schedule)
        rows += [experiment.row(words, [stage]), experiment.row(f"{words}, then a sweep of 10", [stage, sweep])]
    coarse = max(row["calls"] for row in rows[2:]) - experiment.pass_calls
    stage = Stage(math.ceil(coarse / experiment.iteration_calls(None)), random, None)
    rows.append(experiment.row("the model's schedule, for as many calls", [stage]))
    return {
        **described(task, name, count, clues, seed, experiment.judge.note),
        "iterations": iters,
        "data_distance": experiment.data_distance(),
        "steps": rows,
        "environment": environment.describe(experiment.device),
    }


# --------------------------------------------------------------------------------------------------------- distance


def fit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (P,) and the covariance (P, P) of vectors (n, P), float64."""
    vectors = vectors.double()
    return vectors.mean(0), torch.cov(vectors.T).reshape(vectors.shape[1], -1)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return the squared Fréchet distance between two Gaussians, each a mean (P,) and a covariance (P, P).

    Heusel et al. 2017 take it between features of a network; here it is between pixels.
    """
    (mean, covariance), (other_mean, other_covariance) = a, b
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return max(0.0, distance.item())
