"""Repair: how many corrupted boards refinement makes valid, by the number K of swapped pairs of cells.

A board starts valid, in digit images that no model has seen, and K random pairs of its cells are swapped; all cells are
free. K = 0 shows how many intact boards refinement breaks. Source: the K-corrupted boards of Kang et al. 2026.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment, intervals
from ipr_fast.evaluation.arms import Arm, Chains
from ipr_fast.evaluation.evaluate import draw_clues, many
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.corrupt import swap_patches
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import BoardReport, DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku

PAIRS = (0, 1, 3, 5)


def measure_repair(
    task: KnownTask,
    model: Denoiser | TokenDenoiser,
    name: str,
    count: int,
    iters: int = 50,
    pairs: tuple[int, ...] = PAIRS,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Corrupt the same `count` boards by each K of `pairs`, refine them, and return counts ready for JSON.

    name: of the model, for the record. Raises ValueError for a task without boards, and for more pairs than fit.
    """
    if not isinstance(task, (DigitSudoku, TokenSudoku)):
        raise ValueError(f"model: repair is measured on boards of digits, got a model of {task.name}")
    cells = task.side**2
    most = cells // 2
    if not all(0 <= k <= most for k in pairs):
        raise ValueError(f"pairs must be in 0..{most}, half the cells of a board, got {pairs}")
    boards, judge = valid_boards(task, count, seed), task.judge()
    ids = torch.arange(count, device="cpu")
    chains = Chains(model, judge, ids, seed=seed, boards=lambda: boards, progress=progress)
    intact = judge.read(boards.to(chains.device))
    arms = []
    for k in pairs:
        reports: list[BoardReport] = []
        refined = intact

        def judged(_: int, x: Tensor, report: Any, reports: list[BoardReport] = reports) -> None:
            nonlocal refined
            reports.append(report)
            refined = x

        chains.follow(Arm(many(k, "swapped pair"), iters, swapped=k), judged)
        as_before = (judge.read(refined) == intact).flatten(1)
        arms.append({"pairs": k, "as_before": intervals.share(as_before.all(1)), **_by_iteration(reports)})
    return {
        "model": name,
        "task": task.name,
        "samples": count,
        "iterations": iters,
        "seed": seed,
        "judge": judge.note,
        "repair": arms,
        "environment": environment.describe(chains.device),
    }


def valid_boards(task: DigitSudoku | TokenSudoku, count: int, seed: int) -> Tensor:
    """Draw valid boards (B, ...), of images in held-out digits."""
    clues = draw_clues(task, count, (task.side**2, task.side**2), seed)
    assert clues is not None
    return clues[1]


def swap_cells(task: DigitSudoku | TokenSudoku, boards: Tensor, pairs: int, seed: int) -> Tensor:
    """Swap random pairs of cells of each board (B, ...)."""
    return swap_patches(boards, pairs, task.grid.patch_size if isinstance(task, DigitSudoku) else 1, seed=seed)


def _by_iteration(reports: list[BoardReport]) -> dict:
    return {
        "valid_by_iteration": [int(report.valid.sum()) for report in reports],
        "violations_by_iteration": [report.violations.double().mean().item() for report in reports],
        "valid": intervals.share(reports[-1].valid),
    }
