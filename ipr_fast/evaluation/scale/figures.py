"""Pictures of a run: shares over iterations and over model calls, and samples that refinement fixed or broke."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipr_fast.evaluation import plots
from ipr_fast.evaluation.scale.folder import RunFolder
from ipr_fast.evaluation.scale.plan import Plan
from ipr_fast.evaluation.scale.summary import kept_samples
from ipr_fast.tasks.catalog import BoardTask, KnownTask, make_task
from ipr_fast.tasks.sudoku import BoardReport
from ipr_fast.tasks.token_sudoku import TokenSudoku

COLOURS = ("#1a7f37", "#0969da", "#bc4c00", "#8250df", "#bf3989", "#57606a", "#9a6700", "#116329")
MARKERS = "os^DvPX*"
FIXED, BROKEN = 4, 2  # most samples of a gallery
MEASURE_WORDS = {"imbalance": "surplus pixels"}


def curves(summary: dict[str, Any], x: str, label: str) -> bytes:
    """Draw the share of good samples with its 95 % band against a number of the points, a line for each arm.

    An arm without iterations is a point with its interval, or over iterations a dashed line.
    """
    pyplot = plots.load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7.6, 3.6), layout="constrained")
    lines = {}
    for arm, colour, marker in zip(summary["arms"], itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
        at = [point[x] for point in arm["points"]]
        value, low, high = ([100 * point["share"][i] for point in arm["points"]] for i in range(3))
        if len(at) > 1:
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            (line,) = axis.plot(at, value, color=colour, marker=marker, markersize=4.5, markerfacecolor="none")
        elif x == "iteration":
            axis.axhspan(low[0], high[0], color=colour, alpha=0.08, linewidth=0)
            line = axis.axhline(value[0], color=colour, linestyle="--", linewidth=1.2)
        else:
            error = [[value[0] - low[0]], [high[0] - value[0]]]
            line = axis.errorbar(at, value, error, color=colour, fmt=marker, markersize=4.5, capsize=3)
        lines[arm["name"]] = line
    axis.set(xlabel=label, ylabel=f"{summary['adjective']} {summary['noun']}s (%)")
    axis.grid(axis="y", color="#d8dee4", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def gallery(folder: RunFolder, arm: str, scratch: Path) -> tuple[str, bytes] | None:
    """Draw stored samples that an arm's iterations fixed or broke; None without any. scratch: a file to write to.

    Returns a caption and the picture.
    """
    plan = folder.plan
    found, fixed = _chosen(folder, arm)
    if not found:
        return None
    task = make_task(plan.task, plan.mnist, classifier=plan.classifier)
    shown = plan.iterations(plan.arm(arm))
    images = _dense(found, shown, task, plan)
    judge = task.judge()
    reports = {r: judge(images[r]) for r in shown}
    first = "start" if plan.arm(arm).swapped is None else "swapped"
    chosen = range(len(found))
    if not isinstance(task, BoardTask):
        good = torch.zeros(images.shape[:2], dtype=torch.bool, device="cpu")
        distance = torch.zeros(images.shape[:2], device="cpu")
        for r, report in reports.items():
            name, values = next(iter(report.measures().items()))
            good[r], distance[r] = report.good, values.float()
        plots.plot_images(scratch, images, good, (MEASURE_WORDS.get(name, name), distance), shown, chosen)
    else:
        violating = torch.zeros(*images.shape[:2], task.side, task.side, dtype=torch.bool, device="cpu")
        for r, report in reports.items():
            assert isinstance(report, BoardReport)
            violating[r] = report.violating_cells
        draw = plots.plot_grids if isinstance(task, TokenSudoku) else plots.plot_boards
        draw(scratch, images, violating, None, shown, chosen, first)
    broken = len(found) - fixed
    return f"{arm}: {fixed} samples that it fixed, then {broken} that it broke", scratch.read_bytes()


def _chosen(folder: RunFolder, arm: str) -> tuple[list[dict[int, bytes]], int]:
    """Return the samples to show, each by iteration: first those that were fixed, and how many these are."""
    last = folder.plan.arm(arm).iterations
    fixed: list[dict[int, bytes]] = []
    broken: list[dict[int, bytes]] = []
    for _, samples, good in kept_samples(folder, arm):
        for kind, most, rows in (
            (fixed, FIXED, np.flatnonzero(good[last] & ~good[0])),
            (broken, BROKEN, np.flatnonzero(good[0] & ~good[last])),
        ):
            kind += [{r: samples[r][row] for r in samples} for row in rows[: most - len(kind)]]
        if len(fixed) == FIXED and len(broken) == BROKEN:
            break
    return fixed + broken, len(fixed)


def _dense(found: list[dict[int, bytes]], shown: list[int], task: KnownTask, plan: Plan) -> Tensor:
    """Return samples (R + 1, K, ...); those of iterations that are not shown are zeros."""
    is_tokens = isinstance(task, TokenSudoku)
    shape = (task.length,) if isinstance(task, TokenSudoku) else task.grid.sample_shape
    images = np.zeros((shown[-1] + 1, len(found), *shape), np.int64 if is_tokens else np.float32)
    for k, sample in enumerate(found):
        for r in shown:
            images[r, k] = np.frombuffer(sample[r], images.dtype).reshape(shape)
    return torch.from_numpy(images)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()  # in memory
    figure.savefig(file, format="png", dpi=150, facecolor=plots.PAPER)
    plots.load_pyplot().close(figure)
    return file.getvalue()
