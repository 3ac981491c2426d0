"""The settings of `ipr-fast train`: options that are given, else the resumed run's, the recipe's, the defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ipr_fast import checks
from ipr_fast.cli.common import MODEL, RUN, SEED, one_of, option
from ipr_fast.models.files.checkpoints import StoredModel
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.tasks.catalog import TASKS, KnownTask, make_task
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import TrainedConfig, TrainedModel, config_of
from ipr_fast.training.optimizers import OPTIMIZERS
from ipr_fast.training.recipe import NETWORK_SIZES, Recipe
from ipr_fast.training.trainer import DTYPES, END, MAY_CHANGE, TrainSettings

TRAINING = "Training"  # a panel of `--help`
DEFAULTS = TrainSettings()
DEFAULT_TASK = "digit-sudoku-4x4"
# The end of a task's name, the option that must be given again when its run is resumed, its value if there is but one,
# and what the run is with.
ENDS = {
    "-mnist": ("--mnist", "", "MNIST's digits"),
    "-pictures": ("--backgrounds", "", "pictures as backgrounds"),
    "-plain": ("--backgrounds", " plain", "plain backgrounds"),
}


@dataclass(frozen=True)
class NetworkOptions:
    """Sizes of the network; None for the task's own."""

    width: Annotated[int | None, option(MODEL, "Width.", min=1, show_default="the task's")] = None
    depth: Annotated[int | None, option(MODEL, "Layers.", min=1, show_default="the task's")] = None
    num_heads: Annotated[int | None, option(MODEL, "Attention heads.", min=1, show_default="the task's")] = None


def _setting(name: str, help: str, panel: str = TRAINING, **settings: Any) -> Any:
    """The option for a field of TrainSettings. Its default is None, so that a recipe or a run may set the value."""
    return option(panel, help, show_default=f"{getattr(DEFAULTS, name):g}", **settings)


@dataclass(frozen=True)
class TrainingOptions:
    """The fields of TrainSettings; None where the checkpoint's, the recipe's or the default holds."""

    steps: Annotated[
        int | None,
        option(
            TRAINING,
            "End after so many steps.",
            min=1,
            show_default=f"{DEFAULTS.steps:,}; none with --minutes or --recipe; the run's with --resume",
        ),
    ] = None
    minutes: Annotated[
        float | None, option(TRAINING, "End after so many minutes, when the learning rate reaches 0.")
    ] = None
    batch_size: Annotated[int | None, _setting("batch_size", "Samples per step.", min=1)] = None
    learning_rate: Annotated[float | None, _setting("learning_rate", "Highest learning rate.")] = None
    warmup: Annotated[int | None, _setting("warmup", "Steps in which the learning rate rises.", min=0)] = None
    weight_decay: Annotated[float | None, _setting("weight_decay", "Weight decay.")] = None
    ema_decay: Annotated[float | None, _setting("ema_decay", "Decay of the moving average.")] = None
    clip_norm: Annotated[float | None, _setting("clip_norm", "Largest norm of the gradient.")] = None
    save_every: Annotated[int | None, _setting("save_every", "Steps between checkpoints.", min=1)] = None
    dtype: Annotated[str | None, one_of(TRAINING, "TYPE", "Type of products", DTYPES, show_default=DEFAULTS.dtype)] = (
        None
    )
    optimizer: Annotated[
        str | None, one_of(TRAINING, "NAME", "Optimiser", OPTIMIZERS, show_default=DEFAULTS.optimizer)
    ] = None
    symbol_weight: Annotated[
        float | None, _setting("symbol_weight", "Weight of the symbols' cross-entropy, for tasks that know them.")
    ] = None
    mean_weight: Annotated[
        float | None, _setting("mean_weight", "Weight of the error of a sample's mean, for tasks that count.")
    ] = None
    few_active: Annotated[
        float | None, _setting("few_active", "Share of samples with few active patches, for tasks that count.")
    ] = None
    own_patches: Annotated[
        float | None,
        _setting("own_patches", "Share of samples in which --init's own patches stand for clean ones, for digits."),
    ] = None
    compile: Annotated[
        bool | None,
        option(TRAINING, "Fuse network and losses; the first step is not timed.", "--compile/--no-compile", metavar=""),
    ] = None
    seed: Annotated[int | None, _setting("seed", SEED, RUN)] = None


def given(*options: NetworkOptions | TrainingOptions) -> dict[str, Any]:
    """Return the options that were given, by name."""
    values = {name: value for each in options for name, value in dataclasses.asdict(each).items()}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """What a run trains, how, and its network."""

    task: KnownTask
    settings: TrainSettings
    config: TrainedConfig


def plan_new(
    options: dict[str, Any],
    task_name: str | None,
    folders: tuple[str | None, str | None],
    recipe: Recipe | None,
    device_type: str,
    start: StoredModel | None,
) -> Plan:
    """Plan a new run. options: those that were given. folders: what --mnist and --backgrounds were given.

    start: the model whose weights and sizes it starts from. Raises ValueError for a recipe of another task, as its file
    would have the recipe's name.
    """
    if recipe is not None and task_name not in (None, recipe.task):
        raise ValueError(f"--task must be that of the recipe, {recipe.task}, got {task_name}")
    task = make_task(task_name or (recipe.task if recipe else DEFAULT_TASK), *folders)
    chosen: dict[str, Any] = {"steps": DEFAULTS.steps}
    if recipe is not None:
        chosen = {"steps": None, "minutes": recipe.minutes, **recipe.options(device_type)}
    chosen |= _end(options) | options
    sizes = {name: chosen.pop(name) for name in NETWORK_SIZES if name in chosen}
    base = own = config_of(task)
    if isinstance(start, TrainedModel):
        base = start.config
        if _layout(base) != _layout(own):
            raise ValueError(f"--init must be a model of {_layout(own)}, as task {task.name} has, got {_layout(base)}")
    return Plan(task, TrainSettings(**chosen), dataclasses.replace(base, **sizes))


def _layout(config: TrainedConfig) -> str:
    """Describe the samples of a network, as they are cut into patches or positions."""
    if isinstance(config, PatchTransformerConfig):
        return f"samples {config.sample_shape} in patches {config.grid.patch_shape}"
    return f"{config.length} tokens of {config.vocabulary.size}"


def plan_resumed(
    checkpoint: Path,
    options: dict[str, Any],
    task_name: str | None,
    folders: tuple[str | None, str | None],
    recipe: Recipe | None,
) -> Plan:
    """Plan the rest of a run: it goes on with its checkpoint's settings.

    Raises ValueError for options that are not the checkpoint's, except for those that may change.
    """
    state = read_checkpoint(checkpoint)
    task = _resumed_task(checkpoint, str(state.get("task")), task_name or (recipe.task if recipe else None), folders)
    fixed = {name: value for name, value in options.items() if name not in MAY_CHANGE}
    found = {"task": state.get("task"), **state["config"], **state["settings"]}
    checks.same_settings(checkpoint, found, {"task": task.name, **fixed})
    settings = {**state["settings"], **_end(options), **options}
    try:
        config = type(config_of(task))(**state["config"])
        return Plan(task, TrainSettings(**{k: v for k, v in settings.items() if k not in NETWORK_SIZES}), config)
    except TypeError as error:
        raise ValueError(f"{checkpoint}: not a checkpoint of this version ({error})") from error


def _end(options: dict[str, Any]) -> dict[str, Any]:
    """Return both ends of a run if one was given, for it replaces the other."""
    return {name: options.get(name) for name in END} if options.keys() & set(END) else {}


def _resumed_task(checkpoint: Path, found: str, name: str | None, folders: tuple[str | None, str | None]) -> KnownTask:
    """Make the task that an option names, else the checkpoint's."""
    given = dict(zip(("--mnist", "--backgrounds"), folders, strict=True))
    end = next((suffix for suffix in ENDS if found.endswith(suffix)), "")
    own = found.removesuffix(end)
    if end and name in (None, own):
        option_name, value, kind = ENDS[end]
        if given[option_name] is None:
            raise ValueError(f"{option_name}{value} must be given: {checkpoint} is of a run with {kind}")
    if name is None and own not in TASKS:
        raise ValueError(f"{checkpoint}: the task must be one of {', '.join(TASKS)}, got {found}")
    return make_task(name or own, *folders)
