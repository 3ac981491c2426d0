"""Diversity: how evenly valid 4x4 boards cover the 288 grids, before and after refinement.

The training data hold every grid equally often. The chi-square statistic of the counts has 287 degrees of freedom: an
exact sampler gives 287 +- 24.
"""

from __future__ import annotations

from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.grids import all_grids
from ipr_fast.tasks.sudoku import BoardJudge, DigitSudoku, check_grids, read_boards


def measure_diversity(
    task: KnownTask, model: Denoiser, count: int, iters: int = 20, *, seed: int = 0, progress: bool = False
) -> dict:
    """Generate `count` boards, refine them, and return their coverage of the grids, ready for JSON.

    Raises ValueError for another task than 4x4 boards.
    """
    if not isinstance(task, DigitSudoku) or task.side != 4:
        raise ValueError(f"model: diversity is measured on boards of 4x4 cells, got a model of {task.name}")
    judge = task.judge()
    x = generate_batch(count, model=model, seed=seed, progress=progress)
    refined = refine_batch(x, random_patches(), iters, model=model, seed=seed, progress=progress)
    changed = read_boards(x, judge.reader, 4) != read_boards(refined, judge.reader, 4)
    return {
        "boards": count,
        "iterations": iters,
        "one pass": coverage(x, judge),
        "refined": coverage(refined, judge),
        "cells_with_another_digit": changed.double().mean().item(),
        "environment": environment.describe(x.device),
    }


def coverage(boards: Tensor, judge: BoardJudge) -> dict:
    """Count the grids that the valid ones of boards (B, 1, H, W) show; compare with uniform draws.

    Without a valid board chi_square is None.
    """
    shown = read_boards(boards, judge.reader, 4)
    grids = all_grids(4).flatten(1).to(shown.device)
    valid = shown[check_grids(shown).valid].flatten(1)
    count = (valid[:, None] == grids).all(-1).sum(0).double()
    expected = len(valid) / len(grids)
    return {
        "valid": len(valid),
        "distinct": int((count > 0).sum()),
        "distinct_if_uniform": len(grids) * (1 - (1 - 1 / len(grids)) ** len(valid)),
        "chi_square": ((count - expected) ** 2 / expected).sum().item() if len(valid) else None,
        "degrees_of_freedom": len(grids) - 1,
    }
