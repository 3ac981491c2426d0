"""The package's tasks by name, and by the patch grid of a model."""

from __future__ import annotations

from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import SIDES
from ipr_fast.tasks.sudoku import DigitSudoku

DIGIT_SUDOKU = {f"digit-sudoku-{side}x{side}": side for side in SIDES}
TASKS = (*DIGIT_SUDOKU, EvenPixels.name)
KnownTask = DigitSudoku | EvenPixels


def make_task(name: str, mnist: str | None = None) -> KnownTask:
    """Make a task by its name. mnist: the folder of MNIST's files, for boards of 28x28 cells.

    Raises ValueError for an unknown name, and for `mnist` with a task that has no digits.
    """
    if name in DIGIT_SUDOKU:
        return DigitSudoku(DIGIT_SUDOKU[name], mnist)
    if name != EvenPixels.name:
        raise ValueError(f"task must be one of {TASKS}, got {name!r}")
    if mnist is not None:
        raise ValueError(f"mnist: {name} has no digits")
    return EvenPixels()


def task_of(grid: PatchGrid, mnist: str | None = None) -> KnownTask:
    """Make the task whose samples have a model's grid. Raises ValueError if there is none."""
    channels, side = grid.channels, grid.grid_h
    if channels == 1 and side == grid.grid_w and side in SIDES:
        name = f"digit-sudoku-{side}x{side}"
    elif channels == 3:
        name = EvenPixels.name
    else:
        raise ValueError(f"model: no task has samples {grid.sample_shape}; the tasks are {', '.join(TASKS)}")
    task = make_task(name, mnist)
    if task.grid != grid:
        hint = " (digits of 28x28 pixels: see --mnist)" if name in DIGIT_SUDOKU and grid.patch_size == 28 else ""
        raise ValueError(
            f"model: it makes samples {grid.sample_shape} of {grid.num_patches} patches, but {name} has "
            f"{task.grid.sample_shape} of {task.grid.num_patches}{hint}"
        )
    return task
