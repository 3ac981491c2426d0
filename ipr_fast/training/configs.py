"""The network of each task, and its initialisation.

A task of your own has an attribute `config`, a PatchTransformerConfig or, for tokens, a TokenTransformerConfig, and
optionally a method `initialise(model)` that sets the weights of a new model. For the package's tasks both are here, and
such attributes override them. A run may start from another model's weights instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.models.token_transformer_config import TokenTransformerConfig
from ipr_fast.tasks.base import Task
from ipr_fast.tasks.counting_polygons import CountingPolygons, CountingPolygonsSmall
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import box_side
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku
from ipr_fast.training.initialise import bias_heads_to_lines, bias_heads_to_neighbours

TrainedModel = PatchTransformer | TokenTransformer
TrainedConfig = PatchTransformerConfig | TokenTransformerConfig

LARGE: dict[str, Any] = {"width": 256, "depth": 9, "num_heads": 8}  # 7.7 million weights
SMALL: dict[str, Any] = {"width": 128, "depth": 6, "num_heads": 8}  # 1.3 to 1.5 million weights
EVEN_PIXELS_SCHEDULE, POLYGONS_SCHEDULE = (30, 0.9), (10, 0.9)  # Kang et al. 2026
EVEN_PIXELS_HEAD = 16  # hidden units of the pixels' network; one would do for a known pair of colours


def config_of(task: Task) -> TrainedConfig:
    """Return the network's configuration for a task; raise ValueError for a task that has none."""
    own: TrainedConfig | None = getattr(task, "config", None)
    if own is not None:
        return own
    if isinstance(task, DigitSudoku):
        return _of_boards(task)
    if isinstance(task, EvenPixels):
        return _of_even_pixels(task)
    if isinstance(task, CountingPolygons):
        return _of_polygons(task)
    if isinstance(task, TokenSudoku):
        return _of_token_boards(task)
    raise ValueError(f"task {task.name}: must have a `config`, that of its network")


def make_network(config: TrainedConfig) -> TrainedModel:
    """Make the network of a configuration, with random weights."""
    return TokenTransformer(config) if isinstance(config, TokenTransformerConfig) else PatchTransformer(config)


def initialise(task: Task, model: TrainedModel, init: nn.Module | None = None) -> None:
    """Set the weights of a new model: those of `init`, or as the task's own `initialise` does, if it has one.

    Heads for 9x9 boards are biased toward rows, columns and boxes; models of 4x4 boards find these without help. Heads
    for polygons are biased toward neighbours.
    Raises ValueError for an `init` of another architecture or configuration, or not finite.
    """
    if init is not None:
        _copy_weights(init, model)
        return
    own = getattr(task, "initialise", None)
    if own is not None:
        own(model)
    elif isinstance(task, (DigitSudoku, TokenSudoku)) and task.side != 4:
        bias_heads_to_lines(model)
    elif isinstance(task, CountingPolygons) and isinstance(model, PatchTransformer):
        bias_heads_to_neighbours(model)


def _copy_weights(source: nn.Module, model: TrainedModel) -> None:
    if not isinstance(source, type(model)):
        raise ValueError(f"init must be a {type(model).__name__}, got {type(source).__name__}")
    found, expected = source.config.to_dict(), model.config.to_dict()
    other = [f"{name} {found.get(name)} (now {value})" for name, value in expected.items() if found.get(name) != value]
    if other:
        raise ValueError(f"init must be a model of the run's configuration, got {', '.join(other)}")
    if not all(torch.isfinite(weight).all() for weight in source.state_dict().values()):
        raise ValueError("init must have finite weights")
    model.load_state_dict(source.state_dict())


def _of_boards(task: DigitSudoku) -> PatchTransformerConfig:
    grid, size = task.grid, {} if task.side == 4 else LARGE
    return PatchTransformerConfig(grid.channels, grid.height, grid.patch_size, box_size=box_side(task.side), **size)


def _of_token_boards(task: TokenSudoku) -> TokenTransformerConfig:
    side, size = task.side, {} if task.side == 4 else SMALL
    return TokenTransformerConfig(
        vocabulary_size=task.vocabulary.size,
        mask_id=task.vocabulary.mask_id,
        rows=side,
        columns=side,
        box_size=box_side(side),
        **size,
    )


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


def _of_polygons(task: CountingPolygons) -> PatchTransformerConfig:
    grid, schedule = task.grid, POLYGONS_SCHEDULE
    return PatchTransformerConfig(
        grid.channels,
        grid.height,
        grid.patch_size,
        output="clean",  # a patch has 192 numbers, of the small kind 432
        generate_schedule=schedule,
        refine_schedule=schedule,
        **(SMALL if isinstance(task, CountingPolygonsSmall) else LARGE),
    )
