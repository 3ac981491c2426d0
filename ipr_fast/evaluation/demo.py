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
from ipr_fast.evaluation.repair import swap_cells, valid_boards
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.outputs import check_no_folders, prepare_folder, write_json
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.tasks.catalog import BoardTask, KnownTask
from ipr_fast.tasks.sudoku import BoardReport, DigitSudoku, clues_kept
from ipr_fast.tasks.token_sudoku import TokenSudoku

PICTURED_ITERATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
PICTURED_SAMPLES = 6


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    clues: held-out digits at random cells of a board, clues[0] to clues[1] of them. swapped: start from valid boards
    with so many swapped pairs of cells, in place of generated ones. calls: model calls of a regeneration of tokens.
    """

    count: int = 512
    iters: int = 20
    ratio: float = 0.25
    clues: tuple[int, int] = (0, 0)
    seed: int = 0
    swapped: int | None = None
    calls: int = 20


def run_demo(
    task: KnownTask,
    model: Denoiser | TokenDenoiser,
    settings: DemoSettings,
    out: Path,
    *,
    say: Callable[[str], None],
    progress: bool,
) -> dict:
    """Run the demo, tell the user through `say`, and write two pictures and results.json into `out`."""
    judge, start = task.judge(), _swapped(task, settings)
    clues = draw_clues(task, settings.count, settings.clues, settings.seed)
    known, known_values = (None, None) if clues is None else clues
    say(f"{many(settings.count, task.noun)} of {_described(task, settings)}, seed {settings.seed}")
    plots.load_pyplot()  # a missing extra must not cost the user a run
    prepare_folder(out)
    check_no_folders(_output_files(out, task))
    samples: list[Tensor] = []
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
        start=start,
        schedule=TokenSchedule(settings.calls) if isinstance(task, TokenSudoku) else None,
        progress=progress,
        watch=lambda x: samples.append(x.cpu()),
    )
    seconds = time.monotonic() - begun
    results = summarise(trajectory, task) | {"seconds": round(seconds, 1), "judge": judge.note}
    begun_as = "after one pass" if start is None else f"with {many(settings.swapped or 0, 'swapped pair')}"
    for line in [
        "",
        *describe(results, task, settings.iters, begun_as),
        f"  {seconds:.1f} s of generating and refining",
    ]:
        say(line)
    if judge.note:
        say(f"  {judge.note}")
    if clues is not None:
        results["clues_kept"] = int(_clues_kept(task, samples[-1], *clues).sum())
        say(f"  clue cells untouched on {results['clues_kept']} of {settings.count} boards")
    say("")
    for file in _write_output(out, task, torch.stack(samples), trajectory, results, settings, known):
        say(f"wrote {file}")
    return results


def _swapped(task: KnownTask, settings: DemoSettings) -> Tensor | None:
    """Return the boards to start from, if not generated ones."""
    if settings.swapped is None:
        return None
    if not isinstance(task, BoardTask):
        raise ValueError(f"swap: {task.name} has no cells to swap, got {settings.swapped} pairs")
    return swap_cells(task, valid_boards(task, settings.count, settings.seed), settings.swapped, settings.seed)


def _clues_kept(task: KnownTask, samples: Tensor, known: Tensor, known_values: Tensor) -> Tensor:
    """Whether each board's clues are those that were given: (B,) bool."""
    if isinstance(task, DigitSudoku):
        return clues_kept(samples, known, known_values, task.side)
    return ((samples == known_values) | ~known).all(1)


def _described(task: KnownTask, settings: DemoSettings) -> str:
    if not isinstance(task, BoardTask):
        return f"{task.name}, {task.grid.width}x{task.grid.height} pixels"
    low, high = settings.clues
    clues = "no clues" if high == 0 else f"{low} to {high} clues"
    kind = f"tokens, {many(settings.calls, 'call')}" if isinstance(task, TokenSudoku) else "handwritten digits"
    return f"{kind}, {task.side}x{task.side} cells, {clues}"


def _write_output(
    out: Path,
    task: KnownTask,
    found: Tensor,
    trajectory: Trajectory,
    results: dict,
    settings: DemoSettings,
    known: Tensor | None,
) -> list[Path]:
    """Write the pictures and the numbers; return the files. found (R + 1, B, ...): the samples."""
    samples, curve, numbers = written = _output_files(out, task)
    write_json(numbers, {"settings": asdict(settings), **results})
    good, last = trajectory.good, settings.iters
    bad_first = (~good[0]).nonzero().flatten().tolist()
    chosen = (bad_first + good[0].nonzero().flatten().tolist())[:PICTURED_SAMPLES]
    shown = sorted({0, *(i for i in PICTURED_ITERATIONS if i < last), last})
    title = f"{many(settings.count, task.noun)}, alpha = {settings.ratio:g}"
    first = "one pass" if settings.swapped is None else "swapped"
    if isinstance(task, BoardTask):
        boards = [report for report in trajectory.reports if isinstance(report, BoardReport)]
        violating = torch.stack([report.violating_cells for report in boards]).cpu()
        draw_boards = plots.plot_grids if isinstance(task, TokenSudoku) else plots.plot_boards
        draw_boards(samples, found, violating, known, shown, chosen, first)
        plots.plot_good(curve, good, f"{task.adjective} {task.noun}s", title=title, first=first)
    else:
        measures = {name.replace("_std", " deviation"): values for name, values in trajectory.measures().items()}
        plots.plot_images(samples, found, good, next(iter(measures.items())), shown, chosen)
        plots.plot_measures(curve, measures, title=title)
    return written


def _output_files(out: Path, task: KnownTask) -> list[Path]:
    """The files that the demo writes: the samples' picture, the curve, the numbers."""
    return [out / f"{task.noun}s.png", out / "progress.png", out / "results.json"]
