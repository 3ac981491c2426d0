"""The network that a task's model is, and the weights that its training begins with.

A task of your own brings `config`, a PatchTransformerConfig, and if it likes `initialise(model)`, which changes a new
model's weights to those that training should begin with. Those of the package's tasks stand here; they may be given
such attributes as well.
"""

from __future__ import annotations

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.tasks.base import Task
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import box_side
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.training.initialise import look_along_lines

LARGE = {"width": 256, "depth": 9, "num_heads": 8}  # 7.7 million weights
EVEN_PIXELS_SCHEDULE = (30, 0.9)  # that of Kang et al. 2026


def config_of(task: Task) -> PatchTransformerConfig:
    """The network of a task: its own `config` where it has one. Raises ValueError where it needs one."""
    own = getattr(task, "config", None)
    if own is not None:
        return own
    if isinstance(task, DigitSudoku):
        return _of_boards(task)
    if isinstance(task, EvenPixels):
        return _of_even_pixels(task)
    raise ValueError(f"task {task.name}: must have a `config`, the PatchTransformerConfig of its network")


def initialise(task: Task, model: PatchTransformer) -> None:
    """Change a new model's weights to those that training should begin with: by the task's `initialise`, if any.

    Heads of 9x9 boards begin by looking along rows, columns and boxes; 4x4 boards find these without help.
    """
    own = getattr(task, "initialise", None)
    if own is not None:
        own(model)
    elif isinstance(task, DigitSudoku) and task.side != 4:
        look_along_lines(model)


def _of_boards(task: DigitSudoku) -> PatchTransformerConfig:
    grid, size = task.grid, {} if task.side == 4 else LARGE
    return PatchTransformerConfig(grid.channels, grid.height, grid.patch_size, box_size=box_side(task.side), **size)


def _of_even_pixels(task: EvenPixels) -> PatchTransformerConfig:
    grid, schedule = task.grid, EVEN_PIXELS_SCHEDULE
    return PatchTransformerConfig(
        grid.channels, grid.height, grid.patch_size, generate_schedule=schedule, refine_schedule=schedule, **LARGE
    )
