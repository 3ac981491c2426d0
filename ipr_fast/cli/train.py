"""`ipr-fast train`: train a model of a task, and judge its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch

from ipr_fast import outputs
from ipr_fast.cli import convert
from ipr_fast.cli.common import (
    FILES,
    MODEL,
    MODEL_SOURCE,
    DeviceOptions,
    flag,
    load,
    model_from,
    one_of,
    option,
    path_option,
)
from ipr_fast.cli.train_options import DEFAULT_TASK, NetworkOptions, TrainingOptions, given, plan_new, plan_resumed
from ipr_fast.evaluation.evaluate import describe, evaluate
from ipr_fast.evaluation.experiments import ExperimentSettings, run_experiment
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.tokens import TokenExperimentSettings, run_token_experiment
from ipr_fast.models.files.checkpoints import StoredModel, load_model
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.tasks.catalog import TASKS, KnownTask
from ipr_fast.tasks.token_sudoku import TokenSudoku
from ipr_fast.training.configs import TrainedConfig, make_network
from ipr_fast.training.recipe import LARGEST, read_recipe, recipe_names, result_files
from ipr_fast.training.run import CHECKPOINT, EVALUATION, LOG, train
from ipr_fast.training.run import MODEL as MODEL_FILE

JUDGEMENT = "Evaluation"  # a panel of `--help`


def run(
    *,
    out: Annotated[Path, path_option(FILES, "Folder for the checkpoint, the log and the model.")],
    task_name: Annotated[
        str | None, one_of(FILES, "TASK", "What to learn", TASKS, "--task", show_default=DEFAULT_TASK)
    ] = None,
    recipe_name: Annotated[
        str | None,
        one_of(
            FILES,
            "NAME",
            "A task's network and options for one run; stores and measures its model",
            recipe_names(),
            "--recipe",
        ),
    ] = None,
    mnist: Annotated[
        str | None, option(FILES, "Folder of MNIST's original files: 28x28 cells in place of 8x8.", metavar="PATH")
    ] = None,
    backgrounds: Annotated[
        str | None,
        option(
            FILES,
            "Behind the polygons, not paintings: plain, for colours, or a folder of pictures (./plain, if so named).",
            metavar="PATH",
        ),
    ] = None,
    resume: Annotated[
        bool, flag(FILES, "Continue from the checkpoint in --out, if any, with its settings.", "--resume")
    ] = False,
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
            show_default="256; the recipe's with --recipe",
        ),
    ] = None,
    iters: Annotated[
        int | None,
        option(JUDGEMENT, "Iterations of their refinement.", min=1, show_default="10; 50 with --recipe"),
    ] = None,
    device_options: DeviceOptions,
) -> None:
    """Train a model of a task; a killed run can be resumed.

    Example: ipr-fast train --task even-pixels --minutes 30 --out run
    """
    device, progress = device_options.checked_device(), device_options.progress
    recipe, start = None if recipe_name is None else read_recipe(recipe_name), _start(init)
    results: tuple[Path, ...] = () if recipe_name is None else result_files(out, recipe_name)
    outputs.check_no_folders([*(out / name for name in (CHECKPOINT, LOG, MODEL_FILE, EVALUATION)), *results])
    options = given(network, training)
    if resume and (out / CHECKPOINT).exists():
        plan = plan_resumed(out / CHECKPOINT, options, task_name, (mnist, backgrounds), recipe)
    else:
        plan = plan_new(options, task_name, (mnist, backgrounds), recipe, device.type, start)
    task, settings, config = plan.task, plan.settings, plan.config
    if recipe is not None and iters is not None and isinstance(task, TokenSudoku):
        raise ValueError(f"--iters is not a setting of the experiment on {task.name}, which plans by model calls")
    if recipe is not None:
        _check_size(config)
    weights = train(task, settings, out, resume=resume, device=device, config=config, init=start, progress=progress)
    print(f"wrote {weights}")
    if recipe is not None:
        stored, measured = results
        _store(weights, stored)
        judged = {"count": evaluate_count, "iters": iters, "seed": settings.seed}
        chosen = recipe.evaluate | {name: value for name, value in judged.items() if value is not None}
        if chosen.get("count") != 0:
            _measure(task, stored, measured, device, chosen, progress)
    elif evaluate_count != 0:
        _evaluate(task, weights, device, evaluate_count or 256, iters or 10, settings.seed, progress)


def _start(init: str | None) -> StoredModel | None:
    """Return the model whose weights a run starts from, in float32, as the trainer's are."""
    if init is None:
        return None
    with model_from("--init"):
        return load_model(init, dtype=torch.float32)


def _evaluate(
    task: KnownTask, weights: Path, device: torch.device, count: int, iters: int, seed: int, progress: bool
) -> None:
    """Judge samples of a model before and after refinement; print the counts and write them beside its weights."""
    results = evaluate(task, load(str(weights), None, device), count, iters, seed=seed, progress=progress)
    for line in describe(results, task, iters):
        print(line)
    _write(weights.with_name(EVALUATION), {"iters": iters, "seed": seed, **results})


def _check_size(config: TrainedConfig) -> None:
    """Raise ValueError for a network whose weights in float16 have more bytes than a recipe's model may."""
    with torch.device("meta"):
        size = 2 * sum(weight.numel() for weight in make_network(config).state_dict().values())
    if size > LARGEST:
        raise ValueError(f"--recipe: a bundled model must have at most {LARGEST:,} bytes, got {size:,} of weights")


def _store(weights: Path, path: Path) -> None:
    """Store the weights in float16. Raises ValueError for more bytes than a bundled model may have."""
    convert.run(source=str(weights), out=path, sizes=convert.SizeOptions(), dtype="float16")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: a bundled model must have at most {LARGEST:,} bytes, got {size:,}")


def _measure(
    task: KnownTask, path: Path, out: Path, device: torch.device, chosen: dict[str, Any], progress: bool
) -> None:
    """Measure a stored model as `ipr-fast evaluate` does."""
    model = load(str(path), "float32", device)
    if isinstance(model, TokenDenoiser):
        assert isinstance(task, TokenSudoku), "the trainer made the model for the task"
        results = run_token_experiment(task, model, path.stem, TokenExperimentSettings(**chosen), progress=progress)
    else:
        results = run_experiment(task, model, path.stem, ExperimentSettings(**chosen), progress=progress)
    print(report(results))
    _write(out, results)


def _write(path: Path, results: dict[str, Any]) -> None:
    outputs.write_json(path, results)
    print(f"wrote {path}")
