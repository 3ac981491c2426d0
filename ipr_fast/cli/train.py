"""`ipr-fast train`: train a model of a task, and judge its samples."""

from __future__ import annotations

import argparse
import dataclasses

from ipr_fast import files
from ipr_fast.cli.common import add_run_options, command, count, count_or_zero, device_of, path
from ipr_fast.evaluation.evaluate import describe, evaluate
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import config_of
from ipr_fast.training.run import CHECKPOINT, EVALUATION, LOG, MODEL, train
from ipr_fast.training.trainer import DTYPES, END, TrainSettings


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "train", run, "train a model of a task; a killed run can be resumed")
    defaults = TrainSettings()
    parser.add_argument("--task", choices=TASKS, default="digit-sudoku-4x4", help="default digit-sudoku-4x4")
    parser.add_argument("--mnist", help="folder of MNIST's original files: 28x28 cells in place of 8x8")
    parser.add_argument("--out", type=path, required=True, help="folder for the checkpoint, the log and the model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    for name in ("width", "depth", "num_heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=count, help="of the network (default the task's)")
    steps = f"end after so many (default {defaults.steps:,}; with --minutes, no such end; with --resume, the run's end)"
    parser.add_argument("--steps", type=count, help=steps)
    parser.add_argument("--minutes", type=float, help="end after so many; the learning rate falls to 0 until then")
    for name, parse in (
        ("batch_size", count),
        ("learning_rate", float),
        ("warmup", count_or_zero),
        ("weight_decay", float),
        ("ema_decay", float),
        ("clip_norm", float),
        ("save_every", count),
    ):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, default=default, help=f"default {default:g}")
    parser.add_argument("--dtype", choices=DTYPES, default=defaults.dtype, help="of products (default float32)")
    parser.add_argument("--compile", action="store_true", help="fuse network and losses; the first step is not timed")
    parser.add_argument(
        "--evaluate", type=count_or_zero, default=256, help="samples to judge in the end, 0 for none (default 256)"
    )
    parser.add_argument("--iters", type=count, default=10, help="iterations of their refinement (default 10)")
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(arguments, name) for name in names} | _end(arguments))
    task, device, progress = make_task(arguments.task, arguments.mnist), device_of(arguments), not arguments.quiet
    given = {name: getattr(arguments, name) for name in ("width", "depth", "num_heads")}
    sizes = {name: size for name, size in given.items() if size is not None}
    task.config = dataclasses.replace(config_of(task), **sizes)
    files.check_no_folders(arguments.out / name for name in (CHECKPOINT, LOG, MODEL, EVALUATION))
    path = train(task, settings, arguments.out, resume=arguments.resume, device=device, progress=progress)
    print(f"wrote {path}")
    if arguments.evaluate:
        model = load_model(path, device=device)
        results = evaluate(task, model, arguments.evaluate, arguments.iters, seed=arguments.seed, progress=progress)
        for line in describe(results, task, arguments.iters):
            print(line)
        numbers = arguments.out / EVALUATION
        files.write_json(numbers, {"iters": arguments.iters, "seed": arguments.seed, **results})
        print(f"wrote {numbers}")


def _end(arguments: argparse.Namespace) -> dict[str, float | None]:
    """The steps and minutes that end the training, where no option says: those of the run that is resumed, if any."""
    if arguments.steps is not None or arguments.minutes is not None:
        return {}
    checkpoint = arguments.out / CHECKPOINT
    if not arguments.resume or not checkpoint.exists():
        return {"steps": TrainSettings.steps}
    settings = read_checkpoint(checkpoint)["settings"]
    return {name: settings.get(name) for name in END}
