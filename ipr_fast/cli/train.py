"""`ipr-fast train`: train a model of a task, and judge its samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from ipr_fast import outputs
from ipr_fast.cli import convert
from ipr_fast.cli.common import FILES, MODEL, MODEL_SOURCE, RunOptions, flag, model_from, one_of, option, path_option
from ipr_fast.evaluation.evaluate import describe, evaluate
from ipr_fast.evaluation.experiments import ExperimentSettings, run_experiment
from ipr_fast.evaluation.report import report
from ipr_fast.models.files.checkpoints import StoredModel, load_model
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.tasks.catalog import TASKS, KnownTask, make_task
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import config_of
from ipr_fast.training.optimizers import OPTIMIZERS
from ipr_fast.training.recipe import LARGEST, NETWORK_SIZES, Recipe, read_recipe, recipe_names
from ipr_fast.training.run import CHECKPOINT, EVALUATION, LOG, train
from ipr_fast.training.run import MODEL as MODEL_FILE
from ipr_fast.training.trainer import DTYPES, END, TrainSettings

TRAINING, JUDGEMENT = "Training", "Evaluation"  # panels of `--help`
DEFAULTS = TrainSettings()


@dataclass(frozen=True)
class NetworkOptions:
    """Sizes of the network; None for the task's own."""

    width: Annotated[int | None, option(MODEL, "Width.", min=1, show_default="the task's")] = None
    depth: Annotated[int | None, option(MODEL, "Layers.", min=1, show_default="the task's")] = None
    num_heads: Annotated[int | None, option(MODEL, "Attention heads.", min=1, show_default="the task's")] = None


def _setting(name: str, help: str, **settings: Any) -> Any:
    """The option for a field of TrainSettings. Its default is None, so that a recipe may set the value."""
    return option(TRAINING, help, show_default=f"{getattr(DEFAULTS, name):g}", **settings)


@dataclass(frozen=True)
class TrainingOptions:
    """The fields of TrainSettings, but for the seed; None where the recipe's or the default holds."""

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
    compile: Annotated[
        bool | None,
        option(TRAINING, "Fuse network and losses; the first step is not timed.", "--compile/--no-compile", metavar=""),
    ] = None


def run(
    *,
    out: Annotated[Path, path_option(FILES, "Folder for the checkpoint, the log and the model.")],
    task_name: Annotated[
        str | None, one_of(FILES, "TASK", "What to learn", TASKS, "--task", show_default="digit-sudoku-4x4")
    ] = None,
    recipe_name: Annotated[
        str | None,
        one_of(FILES, "NAME", "Train, store and measure as a bundled model is", recipe_names(), "--recipe"),
    ] = None,
    mnist: Annotated[
        str | None, option(FILES, "Folder of MNIST's original files: 28x28 cells in place of 8x8.", metavar="PATH")
    ] = None,
    resume: Annotated[bool, flag(FILES, "Continue from the checkpoint in --out, if any.", "--resume")] = False,
    init: Annotated[
        str | None,
        option(MODEL, f"{MODEL_SOURCE}, whose weights and sizes a new run starts from.", metavar="MODEL"),
    ] = None,
    network: NetworkOptions,
    training: TrainingOptions,
    evaluate_count: Annotated[
        int | None,
        option(
            JUDGEMENT,
            "Samples to judge in the end, 0 for none.",
            "--evaluate",
            min=0,
            show_default="256; 2048 with --recipe",
        ),
    ] = None,
    iters: Annotated[
        int | None,
        option(JUDGEMENT, "Iterations of their refinement.", min=1, show_default="10; 50 with --recipe"),
    ] = None,
    run_options: RunOptions,
) -> None:
    """Train a model of a task; a killed run can be resumed.

    Example: ipr-fast train --task even-pixels --minutes 30 --out run
    """
    device, progress = run_options.checked_device(), run_options.progress
    recipe = None if recipe_name is None else read_recipe(recipe_name)
    task = make_task(task_name or (recipe.task if recipe else "digit-sudoku-4x4"), mnist)
    options = {} if recipe is None else recipe.options(device.type)
    options |= _given(network) | _given(training) | _end(training, recipe, out, resume)
    sizes = {name: options.pop(name) for name in NETWORK_SIZES if name in options}
    settings, start = TrainSettings(**options, seed=run_options.seed), _start(init)
    base = start.config if isinstance(start, PatchTransformer) else config_of(task)
    config = dataclasses.replace(base, **sizes)
    outputs.check_no_folders(out / name for name in (CHECKPOINT, LOG, MODEL_FILE, EVALUATION))
    weights = train(task, settings, out, resume=resume, device=device, config=config, init=start, progress=progress)
    print(f"wrote {weights}")
    seed = run_options.seed
    if recipe is not None:
        stored = _store(weights, out / f"{recipe_name}.safetensors")
        judged = {"count": evaluate_count, "iters": iters, "seed": seed}
        chosen = recipe.evaluate | {name: value for name, value in judged.items() if value is not None}
        _measure(task, stored, device, chosen, progress)
    elif evaluate_count != 0:
        count, iters = evaluate_count or 256, iters or 10
        results = evaluate(task, load_model(weights, device=device), count, iters, seed=seed, progress=progress)
        for line in describe(results, task, iters):
            print(line)
        _write(out / EVALUATION, {"iters": iters, "seed": seed, **results})


def _start(init: str | None) -> StoredModel | None:
    """Return the model whose weights a run starts from, in float32, as the trainer's are."""
    if init is None:
        return None
    with model_from("--init"):
        return load_model(init, dtype=torch.float32)


def _given(options: NetworkOptions | TrainingOptions) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in dataclasses.asdict(options).items() if value is not None}


def _end(training: TrainingOptions, recipe: Recipe | None, out: Path, resume: bool) -> dict[str, float | None]:
    """Return the end of the training: by the options, else of the resumed run, else by the recipe or the default."""
    if training.steps is not None or training.minutes is not None:
        return {"steps": training.steps, "minutes": training.minutes}
    checkpoint = out / CHECKPOINT
    if resume and checkpoint.exists():
        settings = read_checkpoint(checkpoint)["settings"]
        return {name: settings.get(name) for name in END}
    return {"steps": TrainSettings.steps} if recipe is None else {"steps": None, "minutes": recipe.minutes}


def _store(weights: Path, path: Path) -> Path:
    """Store the weights in float16. Raises ValueError for more bytes than a bundled model may have."""
    convert.run(source=str(weights), out=path, sizes=convert.SizeOptions(), dtype="float16")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: a bundled model must have at most {LARGEST:,} bytes, got {size:,}")
    return path


def _measure(task: KnownTask, path: Path, device: torch.device, chosen: dict[str, Any], progress: bool) -> None:
    """Measure a stored model as `ipr-fast evaluate` does; nothing for a count of 0."""
    if chosen.get("count") == 0:
        return
    model = load_model(path, device=device, dtype=torch.float32)
    results = run_experiment(task, model, path.stem, ExperimentSettings(**chosen), progress=progress)
    print(report(results))
    _write(path.with_name(f"quality-{path.stem}.json"), results)


def _write(path: Path, results: dict[str, Any]) -> None:
    outputs.write_json(path, results)
    print(f"wrote {path}")
