"""The demo: generate samples of a task, refine them, count the good ones and draw pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ipr_fast.evaluation import plots
from ipr_fast.evaluation.evaluate import Trajectory, describe, draw_clues, follow, many, summarise
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.outputs import check_no_folders, prepare_folder, write_json
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import BoardReport, DigitSudoku, clues_kept

PICTURED_ITERATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
PICTURED_SAMPLES = 6


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. clues: held-out digits at random cells of a board, clues[0] to clues[1] of them."""

    count: int = 512
    iters: int = 20
    ratio: float = 0.25
    clues: tuple[int, int] = (0, 0)
    seed: int = 0


def run_demo(
    task: KnownTask, model: Denoiser, settings: DemoSettings, out: Path, *, say: Callable[[str], None], progress: bool
) -> dict:
    """Run the demo, tell the user through `say`, and write two pictures and results.json into `out`."""
    judge = task.judge()
    clues = draw_clues(task, settings.count, settings.clues, settings.seed)
    known, known_values = (None, None) if clues is None else clues
    say(f"{many(settings.count, task.noun)} of {_described(task, settings)}, seed {settings.seed}")
    plots.load_pyplot()  # a missing extra must not cost the user a run
    prepare_folder(out)
    check_no_folders(_output_files(out, task))
    images: list[Tensor] = []
    begun = time.monotonic()
    trajectory = follow(
        model,
        judge,
        settings.count,
        settings.iters,
        ratio=settings.ratio,
        seed=settings.seed,
        known=known,
        known_values=known_values,
        progress=progress,
        watch=lambda x: images.append(x.cpu()),
    )
    seconds = time.monotonic() - begun
    results = summarise(trajectory, task) | {"seconds": round(seconds, 1), "judge": judge.note}
    for line in ["", *describe(results, task, settings.iters), f"  {seconds:.1f} s of generating and refining"]:
        say(line)
    if judge.note:
        say(f"  {judge.note}")
    if clues is not None and isinstance(task, DigitSudoku):
        results["clues_kept"] = int(clues_kept(images[-1], *clues, task.side).sum())
        say(f"  clue cells untouched on {results['clues_kept']} of {settings.count} boards")
    say("")
    for file in _write_output(out, task, torch.stack(images), trajectory, results, settings, known):
        say(f"wrote {file}")
    return results


def _described(task: KnownTask, settings: DemoSettings) -> str:
    if not isinstance(task, DigitSudoku):
        return f"{task.name}, {task.grid.width}x{task.grid.height} pixels"
    low, high = settings.clues
    clues = "no clues" if high == 0 else f"{low} to {high} clues"
    return f"handwritten digits, {task.side}x{task.side} cells, {clues}"


def _write_output(
    out: Path,
    task: KnownTask,
    images: Tensor,
    trajectory: Trajectory,
    results: dict,
    settings: DemoSettings,
    known: Tensor | None,
) -> list[Path]:
    """Write the pictures and the numbers; return the files. images (R + 1, B, C, H, W)."""
    samples, curve, numbers = written = _output_files(out, task)
    write_json(numbers, {"settings": asdict(settings), **results})
    good, last = trajectory.good, settings.iters
    bad_first = (~good[0]).nonzero().flatten().tolist()
    chosen = (bad_first + good[0].nonzero().flatten().tolist())[:PICTURED_SAMPLES]
    shown = sorted({0, *(i for i in PICTURED_ITERATIONS if i < last), last})
    title = f"{many(settings.count, task.noun)}, alpha = {settings.ratio:g}"
    if isinstance(task, DigitSudoku):
        boards = [report for report in trajectory.reports if isinstance(report, BoardReport)]
        violating = torch.stack([report.violating_cells for report in boards]).cpu()
        plots.plot_boards(samples, images, violating, known, shown, chosen)
        plots.plot_good(curve, good, f"{task.adjective} {task.noun}s", title=title)
    else:
        measures = {name.replace("_std", " deviation"): values for name, values in trajectory.measures().items()}
        plots.plot_images(samples, images, good, next(iter(measures.items())), shown, chosen)
        plots.plot_measures(curve, measures, title=title)
    return written


def _output_files(out: Path, task: KnownTask) -> list[Path]:
    """The files that the demo writes: the samples' picture, the curve, the numbers."""
    return [out / f"{task.noun}s.png", out / "progress.png", out / "results.json"]
