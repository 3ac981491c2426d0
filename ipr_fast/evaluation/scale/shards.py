"""Shards: fixed ranges of chains of one seed, and how one is computed.

A shard is the same batch wherever it runs, and a chain's random numbers depend on its seed and id alone, so its rows do
not depend on the number of workers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from ipr_fast.evaluation.arms import Arm, Chains, Given
from ipr_fast.evaluation.environment import processor
from ipr_fast.evaluation.evaluate import draw_clues, task_for
from ipr_fast.evaluation.scale.plan import Plan
from ipr_fast.evaluation.scale.records import MEASURE, Rows
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.tasks.base import Judge, Report
from ipr_fast.tasks.catalog import BoardTask, KnownTask, make_task


@dataclass(frozen=True)
class Shard:
    """Chains first..last - 1 of a seed."""

    seed: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"seed-{self.seed}-chains-{self.first:010d}-{self.last - 1:010d}.parquet"

    def num_rows(self, plan: Plan) -> int:
        """Return the number of rows of its records."""
        return (self.last - self.first) * sum(len(plan.iterations(arm)) for arm in plan.arms)


def shards_of(plan: Plan) -> list[Shard]:
    """Return the shards of a plan: first all seeds' first ones, so that an unfinished run has something of each."""
    firsts = range(0, plan.samples, plan.batch)
    return [
        Shard(seed, first, min(first + plan.batch, plan.samples)) for first in firsts for seed in sorted(plan.seeds)
    ]


class Worker:
    """Computes shards of a plan with a model: on one device, one after another."""

    def __init__(self, plan: Plan, model: Denoiser | TokenDenoiser, progress: bool = False) -> None:
        self.plan, self.model, self.progress = plan, model, progress
        self.task: KnownTask = task_for(model, plan.mnist)
        if self.task.name.removesuffix("-mnist") != plan.task:
            raise ValueError(f"model {plan.model} makes samples of {self.task.name}, but the task is {plan.task}")
        if not isinstance(self.task, BoardTask) and (
            plan.clues != (0, 0) or any(a.swapped is not None for a in plan.arms)
        ):
            raise ValueError(f"{plan.task} has no cells: there can be no clues and no swapped cells")
        self.judge: Judge = make_task(plan.task, plan.mnist, classifier=plan.classifier).judge()
        one = Chains(model, self.judge, torch.zeros(1, dtype=torch.int64, device="cpu"), seed=0)
        for arm in plan.arms:
            try:
                one.costs(arm, 0)  # makes the schedules
            except ValueError as error:
                raise ValueError(f"experiment {plan.name}: {error}") from error
        most = one.num_patches
        if plan.clues[1] > most or any(arm.swapped is not None and 2 * arm.swapped > most for arm in plan.arms):
            raise ValueError(f"clues and twice the swapped pairs must be at most {most}, the cells of a board")
        device = contract.device_of(model) or torch.device("cpu")
        self.processor = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)

    def compute(self, shard: Shard) -> tuple[Rows, float, float]:
        """Run every arm on a shard's chains. Returns its rows, the seconds it took, and those in the engine."""
        begun, rows = time.perf_counter(), Rows()
        ids = torch.arange(shard.first, shard.last, device="cpu")
        given = None if self.plan.clues == (0, 0) else self._boards(shard, self.plan.clues)
        chains = Chains(
            self.model,
            self.judge,
            ids,
            seed=shard.seed,
            given=given,
            boards=partial(self._valid_boards, shard),
            progress=self.progress,
        )
        for arm in self.plan.arms:
            self._run(arm, chains, ids, rows)
        return rows, time.perf_counter() - begun, chains.engine_seconds

    def _run(self, arm: Arm, chains: Chains, ids: Tensor, rows: Rows) -> None:
        begun, seed = time.perf_counter(), chains.seed
        num_kept = int((ids < self.plan.kept).sum())

        def watch(iteration: int, samples: Tensor, report: Report) -> None:
            costs = chains.costs(arm, iteration)
            rows.add(
                seed,
                ids,
                arm.name,
                iteration,
                {"good": report.good, **{MEASURE + name: values for name, values in report.measures().items()}},
                {"model_calls": costs.calls, "evaluations": costs.evaluations, "reward_calls": costs.rewards},
                time.perf_counter() - begun,
                samples[:num_kept],
            )

        chains.follow(arm, watch, frozenset(self.plan.iterations(arm)))

    def _valid_boards(self, shard: Shard) -> Tensor:
        assert isinstance(self.task, BoardTask)
        return self._boards(shard, (self.task.side**2,) * 2).values

    def _boards(self, shard: Shard, clues: tuple[int, int]) -> Given:
        """Draw clues of each chain from a generator of its own."""
        base = int.from_bytes(sha256(f"clues {shard.seed}".encode()).digest()[:4], "big")
        drawn = [draw_clues(self.task, 1, clues, (base + chain) % 2**32) for chain in range(shard.first, shard.last)]
        known, values = zip(*(each for each in drawn if each is not None), strict=True)
        return Given(torch.cat(known), torch.cat(values))
