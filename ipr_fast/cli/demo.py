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
from ipr_fast.evaluation.evaluate import task_for
from ipr_fast.resolve import DEFAULT_MODEL
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.catalog import BoardTask
from ipr_fast.tasks.token_sudoku import TokenSudoku

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
    swap: Annotated[
        int | None,
        option(REFINEMENT, "Start from valid boards with so many swapped pairs of cells; generate none.", min=0),
    ] = None,
    calls: Annotated[
        int | None,
        option(REFINEMENT, "Model calls of a regeneration of tokens.", min=1, show_default=str(DemoSettings.calls)),
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
    task = task_for(denoiser, mnist)
    if calls is not None and not isinstance(task, TokenSudoku):
        raise ValueError(f"--calls is for models of tokens, got a model of {task.name}")
    if swap is not None and clues is not None:
        raise ValueError("--swap starts with all cells free, so it takes no --clues")
    if count is None:
        positions = task.length if isinstance(task, TokenSudoku) else task.grid.num_patches
        count = MANY if positions <= 16 or device.type == "cuda" else FEW
    if clues is None:
        with_clues = isinstance(task, BoardTask) and task.side == 9 and swap is None
        clues = (0, 26) if with_clues else (0, 0)
    settings = DemoSettings(count, iters, ratio, clues, run_options.seed, swap, calls or DemoSettings.calls)
    run_demo(task, denoiser, settings, out, say=print, progress=run_options.progress)
