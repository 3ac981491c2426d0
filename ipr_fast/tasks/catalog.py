"""The tasks by name, and the one that a model was made for."""

from __future__ import annotations

from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import SIDES
from ipr_fast.tasks.sudoku import DigitSudoku

DIGIT_SUDOKU = {f"digit-sudoku-{side}x{side}": side for side in SIDES}
TASKS = (*DIGIT_SUDOKU, EvenPixels.name)
KnownTask = DigitSudoku | EvenPixels


def make_task(name: str, mnist: str | None = None) -> KnownTask:
    """The task of that name. mnist: the folder of MNIST's files, for boards of 28x28 cells.

    Raises ValueError for another name, or MNIST where there are no digits.
    """
    if name in DIGIT_SUDOKU:
        return DigitSudoku(DIGIT_SUDOKU[name], mnist)
    if name != EvenPixels.name:
        raise ValueError(f"task must be one of {TASKS}, got {name!r}")
    if mnist is not None:
        raise ValueError(f"mnist: {name} has no digits")
    return EvenPixels()


def task_of(grid: PatchGrid, mnist: str | None = None) -> KnownTask:
    """The task whose samples have that grid. Raises ValueError when there is none."""
    channels, side = grid.channels, grid.grid_h
    if channels == 1 and side == grid.grid_w and side in SIDES:
        name = next(name for name in DIGIT_SUDOKU if DIGIT_SUDOKU[name] == side)
    elif channels == 3:
        name = EvenPixels.name
    else:
        raise ValueError(f"model: it makes samples {grid.sample_shape}, which are those of no task: {', '.join(TASKS)}")
    task = make_task(name, mnist)
    own = task.grid
    if own != grid:
        hint = " (see --mnist)" if name in DIGIT_SUDOKU else ""
        raise ValueError(
            f"model: it makes samples {grid.sample_shape} of {grid.num_patches} patches, those of {name} are "
            f"{own.sample_shape} of {own.num_patches}{hint}"
        )
    return task
