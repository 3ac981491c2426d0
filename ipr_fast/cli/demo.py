"""`ipr-fast demo`: generate samples, refine them, count the good ones and draw pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from ipr_fast.cli.common import add_model, add_run_options, command, count, device_of, load, path
from ipr_fast.evaluation.demo import DemoSettings, run_demo
from ipr_fast.refine import DEFAULT_MODEL
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.catalog import task_of
from ipr_fast.tasks.sudoku import DigitSudoku

MANY, FEW = 512, 32  # samples of a demo


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "demo", run, "generate samples, refine them, count the good ones and draw pictures")
    parser.add_argument(
        "--count",
        "--boards",
        type=count,
        help=f"samples to generate (default {MANY}; {FEW} of a larger model without a GPU)",
    )
    parser.add_argument("--iters", type=count, default=20, help="iterations of refinement (default 20)")
    parser.add_argument("--ratio", type=float, default=0.25, help="alpha, the share of patches renoised (default 0.25)")
    parser.add_argument(
        "--clues",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="clue cells a board (default 0 0; 0 26 on 9x9 cells)",
    )
    parser.add_argument("--out", type=path, default=Path("demo"), help="folder for pictures and numbers (default demo)")
    parser.add_argument("--mnist", help="folder of MNIST's original files, for a model of 28x28 cells")
    add_model(parser, f"default {DEFAULT_MODEL}")
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out: {arguments.out} is not a folder")
    policy, device = random_patches(arguments.ratio), device_of(arguments)
    model = load(arguments, DEFAULT_MODEL, device)
    task = task_of(model.grid, arguments.mnist)
    is_small = model.grid.num_patches <= 16 or device.type == "cuda"
    clues = arguments.clues or ((0, 26) if isinstance(task, DigitSudoku) and task.side == 9 else (0, 0))
    settings = DemoSettings(
        arguments.count or (MANY if is_small else FEW), arguments.iters, policy.ratio, tuple(clues), arguments.seed
    )
    run_demo(task, model, settings, arguments.out, say=print, progress=not arguments.quiet)
