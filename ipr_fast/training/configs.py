"""The network of each task, and its initialisation.

A task of your own has an attribute `config`, a PatchTransformerConfig, and optionally a method `initialise(model)` that
sets the weights of a new model. For the package's tasks both are here, and such attributes override them. A run may
start from another model's weights instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.tasks.base import Task
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import box_side
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.training.initialise import bias_heads_to_lines

LARGE: dict[str, Any] = {"width": 256, "depth": 9, "num_heads": 8}  # 7.7 million weights
EVEN_PIXELS_SCHEDULE = (30, 0.9)  # Kang et al. 2026
EVEN_PIXELS_HEAD = 16  # hidden units of the pixels' network; one would do for a known pair of colours


def config_of(task: Task) -> PatchTransformerConfig:
    """Return the network's configuration for a task; raise ValueError for a task that has none."""
    own: PatchTransformerConfig | None = getattr(task, "config", None)
    if own is not None:
        return own
    if isinstance(task, DigitSudoku):
        return _of_boards(task)
    if isinstance(task, EvenPixels):
        return _of_even_pixels(task)
    raise ValueError(f"task {task.name}: must have a `config`, the PatchTransformerConfig of its network")


def initialise(task: Task, model: PatchTransformer, init: nn.Module | None = None) -> None:
    """Set the weights of a new model: those of `init`, or as the task's own `initialise` does, if it has one.

    Heads for 9x9 boards are biased toward rows, columns and boxes; models of 4x4 boards find these without help.
    Raises ValueError for an `init` that is not a PatchTransformer, of another configuration, or not finite.
    """
    if init is not None:
        _copy_weights(init, model)
        return
    own = getattr(task, "initialise", None)
    if own is not None:
        own(model)
    elif isinstance(task, DigitSudoku) and task.side != 4:
        bias_heads_to_lines(model)


def _copy_weights(source: nn.Module, model: PatchTransformer) -> None:
    if not isinstance(source, PatchTransformer):
        raise ValueError(f"init must be a PatchTransformer, got {type(source).__name__}")
    found, expected = source.config.to_dict(), model.config.to_dict()
    other = [f"{name} {found[name]} (now {value})" for name, value in expected.items() if found[name] != value]
    if other:
        raise ValueError(f"init must be a model of the run's configuration, got {', '.join(other)}")
    if not all(torch.isfinite(weight).all() for weight in source.state_dict().values()):
        raise ValueError("init must have finite weights")
    model.load_state_dict(source.state_dict())


def _of_boards(task: DigitSudoku) -> PatchTransformerConfig:
    grid, size = task.grid, {} if task.side == 4 else LARGE
    return PatchTransformerConfig(grid.channels, grid.height, grid.patch_size, box_size=box_side(task.side), **size)


def _of_even_pixels(task: EvenPixels) -> PatchTransformerConfig:
    grid, schedule = task.grid, EVEN_PIXELS_SCHEDULE
    return PatchTransformerConfig(
        grid.channels,
        grid.height,
        grid.patch_size,
        pixel_width=EVEN_PIXELS_HEAD,
        generate_schedule=schedule,
        refine_schedule=schedule,
        **LARGE,
    )
