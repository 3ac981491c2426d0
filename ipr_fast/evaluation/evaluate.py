"""What refinement does to a model's samples: generate, refine, judge after every iteration, and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipr_fast.checks import device_of
from ipr_fast.evaluation import intervals
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.base import Judge, Report, Task


@dataclass(frozen=True)
class Trajectory:
    """What a judge says of B chains after the first pass and after each of R iterations."""

    reports: list[Report]  # R + 1

    @property
    def good(self) -> Tensor:
        """(R + 1, B) bool."""
        return torch.stack([report.good for report in self.reports])

    def measures(self) -> dict[str, Tensor]:
        """Each of the reports' measures, (R + 1, B)."""
        each = [report.measures() for report in self.reports]
        return {name: torch.stack([measures[name] for measures in each]) for name in each[0]}


def follow(
    model: Denoiser,
    judge: Judge,
    count: int,
    iters: int,
    *,
    ratio: float = 0.25,
    seed: int = 0,
    known: Tensor | None = None,
    known_values: Tensor | None = None,
    progress: bool = False,
    watch: Callable[[Tensor], None] = lambda images: None,
) -> Trajectory:
    """Generate `count` samples, refine them with `random_patches(ratio)`, and judge them on the way.

    `watch` gets the samples (B, C, H, W), on the model's device, after the first pass and after each iteration.
    """
    shared = {"model": model, "seed": seed, "progress": progress}
    device = device_of(model) or torch.device("cpu")
    if known is not None:
        shared["known"] = known.to(device)
    if known_values is not None:
        known_values = known_values.to(device)
    reports = []

    def see(_: int, images: Tensor) -> None:
        watch(images)
        report = judge(images)
        reports.append(type(report)(*(field.cpu() for field in report)))

    x = generate_batch(count, known_values=known_values, **shared)
    see(0, x)
    refine_batch(x, random_patches(ratio), iters, callback=see, **shared)
    return Trajectory(reports)


def evaluate(task: Task, model: Denoiser, count: int, iters: int, *, seed: int = 0, progress: bool = False) -> dict:
    """The counts and intervals of `summarise` for `count` samples of a model of the task, refined `iters` times."""
    return summarise(follow(model, task.judge(), count, iters, seed=seed, progress=progress), task)


def summarise(trajectory: Trajectory, task: Task) -> dict:
    """Counts, intervals and means, ready for JSON."""
    good = trajectory.good
    before, after = good[0], good[-1]
    return {
        f"{task.noun}s": len(before),
        f"{task.adjective}_before": int(before.sum()),
        f"{task.adjective}_after": int(after.sum()),
        "share_before": intervals.share(before),
        "share_after": intervals.share(after),
        "gain": intervals.paired_gain(before, after),
        "fixed": int((after & ~before).sum()),
        "broken": int((before & ~after).sum()),
        f"{task.adjective}_by_iteration": good.sum(1).tolist(),
        **{
            f"mean_{name}_by_iteration": values.double().mean(1).tolist()
            for name, values in trajectory.measures().items()
        },
    }


def describe(results: dict, task: Task, iters: int) -> list[str]:
    """The results of `summarise` as lines for a person."""
    n, word = results[f"{task.noun}s"], task.adjective
    before, after = results[f"{word}_before"], results[f"{word}_after"]
    means = {name: values for name, values in results.items() if name.startswith("mean_")}
    return [
        f"  {'after one pass':22}{before:5d} of {n} {word}   {results['share_before'].percent()}",
        f"  {'after ' + many(iters, 'iteration'):22}{after:5d} of {n} {word}   {results['share_after'].percent()}",
        f"  {'gain':22} {results['gain'].points()}   (paired; intervals are 95 %)",
        f"  {many(results['fixed'], task.noun)} fixed, {results['broken']} broken",
        *(
            f"  {_words(name):22} {values[0]:.3g} before, {values[-1]:.3g} after, on average"
            for name, values in means.items()
        ),
    ]


def many(count: int, thing: str) -> str:
    """The count with its noun in the right number."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _words(name: str) -> str:
    return name.removeprefix("mean_").removesuffix("_by_iteration").replace("_", " ").replace("std", "deviation")
