"""`ipr-fast demo`: generate samples, refine them, count the good ones and draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ipr_fast.cli.common import (
    FILES,
    REFINEMENT,
    DtypeOption,
    RunOptions,
    load,
    model_option,
    option,
    path_option,
)
from ipr_fast.evaluation.demo import DemoSettings, run_demo
from ipr_fast.resolve import DEFAULT_MODEL
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.catalog import task_of
from ipr_fast.tasks.sudoku import DigitSudoku

MANY, FEW = 512, 32  # samples of a demo


def run(
    *,
    out: Annotated[Path, path_option(FILES, "Folder for pictures and numbers.")] = Path("demo"),
    mnist: Annotated[
        str | None, option(FILES, "Folder of MNIST's original files, for a model of 28x28 cells.", metavar="PATH")
    ] = None,
    count: Annotated[
        int | None,
        option(
            REFINEMENT,
            "Samples to generate.",
            "--count",
            "--boards",
            min=1,
            show_default=f"{MANY}; {FEW} of a larger model without a GPU",
        ),
    ] = None,
    iters: Annotated[int, option(REFINEMENT, "Iterations.", min=1)] = 20,
    ratio: Annotated[float, option(REFINEMENT, "Alpha, the share of patches renoised.")] = 0.25,
    clues: Annotated[
        tuple[int, int] | None,
        option(REFINEMENT, "Clue cells per board.", metavar="LOW HIGH", show_default="0 0; 0 26 on 9x9 cells"),
    ] = None,
    model: Annotated[str, model_option()] = DEFAULT_MODEL,
    dtype: DtypeOption = None,
    run_options: RunOptions,
) -> None:
    """Generate samples, refine them, count the good ones and draw pictures.

    Example: ipr-fast demo --count 512 --iters 20 --out demo
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is not a folder")
    random_patches(ratio)  # checks the ratio before the model is loaded
    device = run_options.checked_device()
    denoiser = load(model, dtype, device)
    task = task_of(denoiser.grid, mnist)
    if count is None:
        count = MANY if denoiser.grid.num_patches <= 16 or device.type == "cuda" else FEW
    if clues is None:
        clues = (0, 26) if isinstance(task, DigitSudoku) and task.side == 9 else (0, 0)
    settings = DemoSettings(count, iters, ratio, clues, run_options.seed)
    run_demo(task, denoiser, settings, out, say=print, progress=run_options.progress)
