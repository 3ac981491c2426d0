"""`ipr-fast train`: train a model of a task, and judge its samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ipr_fast import files
from ipr_fast.cli.common import FILES, MODEL, RunOptions, flag, one_of, option, path_option
from ipr_fast.evaluation.evaluate import describe, evaluate
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import config_of
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


@dataclass(frozen=True)
class TrainingOptions:
    """The fields of TrainSettings, but for the seed."""

    steps: Annotated[
        int | None,
        option(
            TRAINING,
            "End after so many steps.",
            min=1,
            show_default=f"{DEFAULTS.steps:,}; none with --minutes; the run's with --resume",
        ),
    ] = None
    minutes: Annotated[
        float | None, option(TRAINING, "End after so many minutes, when the learning rate reaches 0.")
    ] = None
    batch_size: Annotated[int, option(TRAINING, "Samples per step.", min=1)] = DEFAULTS.batch_size
    learning_rate: Annotated[float, option(TRAINING, "Highest learning rate.")] = DEFAULTS.learning_rate
    warmup: Annotated[int, option(TRAINING, "Steps in which the learning rate rises.", min=0)] = DEFAULTS.warmup
    weight_decay: Annotated[float, option(TRAINING, "Weight decay.")] = DEFAULTS.weight_decay
    ema_decay: Annotated[float, option(TRAINING, "Decay of the moving average.")] = DEFAULTS.ema_decay
    clip_norm: Annotated[float, option(TRAINING, "Largest norm of the gradient.")] = DEFAULTS.clip_norm
    save_every: Annotated[int, option(TRAINING, "Steps between checkpoints.", min=1)] = DEFAULTS.save_every
    dtype: Annotated[str, one_of(TRAINING, "TYPE", "Type of products", DTYPES)] = DEFAULTS.dtype
    compile: Annotated[bool, flag(TRAINING, "Fuse network and losses; the first step is not timed.", "--compile")] = (
        False
    )


def run(
    *,
    out: Annotated[Path, path_option(FILES, "Folder for the checkpoint, the log and the model.")],
    task_name: Annotated[str, one_of(FILES, "TASK", "What to learn", TASKS, "--task")] = "digit-sudoku-4x4",
    mnist: Annotated[
        str | None, option(FILES, "Folder of MNIST's original files: 28x28 cells in place of 8x8.", metavar="PATH")
    ] = None,
    resume: Annotated[bool, flag(FILES, "Continue from the checkpoint in --out, if any.", "--resume")] = False,
    network: NetworkOptions,
    training: TrainingOptions,
    evaluate_count: Annotated[
        int, option(JUDGEMENT, "Samples to judge in the end, 0 for none.", "--evaluate", min=0)
    ] = 256,
    iters: Annotated[int, option(JUDGEMENT, "Iterations of their refinement.", min=1)] = 10,
    run_options: RunOptions,
) -> None:
    """Train a model of a task; a killed run can be resumed.

    Example: ipr-fast train --task even-pixels --minutes 30 --out run
    """
    settings = TrainSettings(**(dataclasses.asdict(training) | _end(training, out, resume)), seed=run_options.seed)
    task, device = make_task(task_name, mnist), run_options.checked_device()
    sizes = {name: size for name, size in dataclasses.asdict(network).items() if size is not None}
    task.config = dataclasses.replace(config_of(task), **sizes)
    files.check_no_folders(out / name for name in (CHECKPOINT, LOG, MODEL_FILE, EVALUATION))
    weights = train(task, settings, out, resume=resume, device=device, progress=run_options.progress)
    print(f"wrote {weights}")
    if evaluate_count:
        model = load_model(weights, device=device)
        results = evaluate(task, model, evaluate_count, iters, seed=run_options.seed, progress=run_options.progress)
        for line in describe(results, task, iters):
            print(line)
        numbers = out / EVALUATION
        files.write_json(numbers, {"iters": iters, "seed": run_options.seed, **results})
        print(f"wrote {numbers}")


def _end(training: TrainingOptions, out: Path, resume: bool) -> dict[str, float | None]:
    """Return the end of the training if no option gives it: that of the resumed run, or the default steps."""
    if training.steps is not None or training.minutes is not None:
        return {}
    checkpoint = out / CHECKPOINT
    if not resume or not checkpoint.exists():
        return {"steps": TrainSettings.steps}
    settings = read_checkpoint(checkpoint)["settings"]
    return {name: settings.get(name) for name in END}
