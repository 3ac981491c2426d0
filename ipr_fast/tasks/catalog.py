"""The package's tasks by name, and by the samples of a model."""

from __future__ import annotations

from ipr_fast.sampling.patches import Grid
from ipr_fast.sampling.tokens import Vocabulary
from ipr_fast.tasks.counting_polygons import CountingPolygons, CountingPolygonsSmall
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import SIDES
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku

DIGIT_SUDOKU = {f"digit-sudoku-{side}x{side}": side for side in SIDES}
TOKEN_SUDOKU = {f"token-sudoku-{side}x{side}": side for side in SIDES}
TASKS = (*DIGIT_SUDOKU, EvenPixels.name, CountingPolygons.name, CountingPolygonsSmall.name, *TOKEN_SUDOKU)
BoardTask = DigitSudoku | TokenSudoku  # of cells: there may be clues, and cells that are swapped
ImageTask = DigitSudoku | EvenPixels | CountingPolygons
KnownTask = ImageTask | TokenSudoku


def make_task(
    name: str, mnist: str | None = None, backgrounds: str | None = None, classifier: str | None = None
) -> KnownTask:
    """Make a task by its name. mnist: the folder of MNIST's files, for boards of 28x28 cells.

    backgrounds, classifier: of Counting Polygons, see there. Raises ValueError for an unknown name and for a
    folder that the task has no use for.
    """
    if name in TASKS and name != CountingPolygons.name:
        for what, folder in (("backgrounds", backgrounds), ("classifier", classifier)):
            if folder is not None:
                raise ValueError(f"{what}: {name} has none")
    if name in DIGIT_SUDOKU:
        return DigitSudoku(DIGIT_SUDOKU[name], mnist)
    if name not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {name!r}")
    if mnist is not None:
        raise ValueError(f"mnist: {name} has no digit images")
    if name == CountingPolygons.name:
        return CountingPolygons(backgrounds, classifier)
    if name == CountingPolygonsSmall.name:
        return CountingPolygonsSmall()
    return TokenSudoku(TOKEN_SUDOKU[name]) if name in TOKEN_SUDOKU else EvenPixels()


def task_of(grid: Grid, mnist: str | None = None) -> ImageTask:
    """Make the task whose samples have a model's grid. Raises ValueError if there is none."""
    channels, side = grid.sample_shape[0], grid.grid_shape[-1]
    task: ImageTask
    if channels == 1 and grid.grid_shape == (side, side) and side in SIDES:
        task = DigitSudoku(side, mnist)
    elif channels == 3 and len(grid.sample_shape) == 3:
        tasks = (EvenPixels(), CountingPolygons(), CountingPolygonsSmall())
        task = next((task for task in tasks if task.grid.sample_shape == grid.sample_shape), tasks[0])
        if mnist is not None:
            raise ValueError(f"mnist: {task.name} has no digit images")
    else:
        raise ValueError(f"model: no task has samples {grid.sample_shape}; the tasks are {', '.join(TASKS)}")
    if task.grid != grid:
        is_mnist = isinstance(task, DigitSudoku) and grid.sample_shape == (1, 28 * side, 28 * side)
        hint = " (digits of 28x28 pixels: see --mnist)" if is_mnist else ""
        raise ValueError(
            f"model: it makes samples {grid.sample_shape} of {grid.num_patches} patches, but {task.name} has "
            f"{task.grid.sample_shape} of {task.grid.num_patches}{hint}"
        )
    return task


def task_of_tokens(vocabulary: Vocabulary, length: int) -> TokenSudoku:
    """Make the task whose samples hold so many tokens of a model's vocabulary. Raises ValueError if there is none."""
    for task in map(TokenSudoku, SIDES):
        if (task.vocabulary, task.length) == (vocabulary, length):
            return task
    raise ValueError(
        f"model: no task has samples of {length} tokens of {vocabulary}; the tasks of tokens are "
        f"{', '.join(TOKEN_SUDOKU)}"
    )
