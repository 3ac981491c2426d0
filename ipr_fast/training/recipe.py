"""Recipes: a task's network and options for one run, as TOML files in recipes/.

The model cards list the commands that made the bundled weights.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ipr_fast.tasks.catalog import TASKS
from ipr_fast.training.trainer import TrainSettings

FOLDER = Path(__file__).parent / "recipes"
LARGEST = 16 * 2**20  # bytes of a bundled model in float16
NETWORK_SIZES = ("width", "depth", "num_heads")
_OPTIONS = {*NETWORK_SIZES, *(each.name for each in fields(TrainSettings))} - {"steps", "minutes", "seed"}


@dataclass(frozen=True)
class Recipe:
    """A task, how long to train, and what to measure; `gpu` and `cpu` hold the options of `ipr-fast train` for each.

    evaluate: the settings of the experiment on the finished model (`ExperimentSettings`) that differ from its defaults.
    """

    task: str
    minutes: float
    gpu: dict[str, Any]
    cpu: dict[str, Any]
    evaluate: dict[str, Any] = field(default_factory=dict)

    def options(self, device_type: str) -> dict[str, Any]:
        """Return the options for a device of that type: of the network and of TrainSettings."""
        return dict(self.gpu if device_type == "cuda" else self.cpu)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def result_files(out: Path, name: str) -> tuple[Path, Path]:
    """Return where a run with a recipe in the folder `out` stores its model, and what is measured of it."""
    return out / f"{name}.safetensors", out / f"quality-{name}.json"


def read_recipe(name: str) -> Recipe:
    """Read recipes/NAME.toml. Raises ValueError for an unknown name, task or option."""
    if name not in recipe_names():
        raise ValueError(f"recipe must be one of {', '.join(recipe_names())}, got {name!r}")
    try:
        recipe = Recipe(**tomllib.loads((FOLDER / f"{name}.toml").read_text()))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise ValueError(f"recipe {name}: {error}") from error
    if recipe.task not in TASKS:
        raise ValueError(f"recipe {name}: task must be one of {', '.join(TASKS)}, got {recipe.task!r}")
    unknown = sorted({*recipe.gpu, *recipe.cpu} - _OPTIONS)
    if unknown:
        raise ValueError(f"recipe {name}: no options of training: {', '.join(unknown)}")
    return recipe
