"""The demo: generate boards of handwritten digits, refine them, and count what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ipr_fast import intervals, plots
from ipr_fast.checks import device_of
from ipr_fast.files import prepare_folder
from ipr_fast.masks import random_patches
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.tasks.sudoku import BoardReport, DigitSudoku, clues_kept, draw_boards, random_clues, random_grids


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. Clues are held-out digits at random cells, clues[0] to clues[1] of them a board."""

    boards: int = 512
    iters: int = 20
    ratio: float = 0.25
    clues: tuple[int, int] = (0, 0)
    seed: int = 0


@dataclass(frozen=True)
class Trajectory:
    """The boards after the first pass and after every iteration: each field has a first dimension of R + 1."""

    images: Tensor  # (R + 1, B, 1, H, W)
    valid: Tensor  # (R + 1, B) bool
    violations: Tensor  # (R + 1, B)
    violating_cells: Tensor  # (R + 1, B, n, n) bool

    @classmethod
    def of(cls, images: list[Tensor], judge: Callable[[Tensor], BoardReport]) -> Trajectory:
        reports = [judge(x) for x in images]
        return cls(torch.stack(images), *(torch.stack(field) for field in zip(*reports, strict=True)))


def draw_clues(
    task: DigitSudoku, boards: int, clues: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Clues (known (B, N), known_values (B, 1, H, W)) of random valid boards in held-out digits; None for none."""
    if clues == (0, 0):
        return None, None
    generator = torch.Generator().manual_seed(seed)
    values = draw_boards(random_grids(boards, task.side, generator), task.test, generator)
    return random_clues(boards, task.side, *clues, generator), values


def run_demo(
    task: DigitSudoku, model: Denoiser, settings: DemoSettings, out: Path, *, say: Callable[[str], None], progress: bool
) -> dict:
    """Run it, tell the user through `say`, and write boards.png, validity.png and results.json into `out`."""
    judge = task.judge()
    known, values = draw_clues(task, settings.boards, settings.clues, settings.seed)
    clues = "no clues" if known is None else f"{settings.clues[0]} to {settings.clues[1]} clues"
    say(
        f"{_many(settings.boards, 'board')} of handwritten digits, {task.side}x{task.side} cells, {clues}, "
        f"seed {settings.seed}"
    )
    plots.require()  # what is missing must not cost the user a run
    prepare_folder(out)
    device, shared = device_of(model), {"model": model, "seed": settings.seed, "progress": progress}
    if known is not None:
        shared["known"] = known.to(device)
    begun = time.monotonic()
    x = generate_batch(settings.boards, known_values=None if values is None else values.to(device), **shared)
    images = [x.cpu()]
    refine_batch(
        x,
        random_patches(settings.ratio),
        settings.iters,
        callback=lambda _, refined: images.append(refined.cpu()),
        **shared,
    )
    seconds = time.monotonic() - begun
    trajectory = Trajectory.of(images, judge)
    results = summarise(trajectory) | {"seconds": round(seconds, 1), "reader_accuracy": judge.reader_accuracy}
    if known is not None:
        results["clues_kept"] = int(clues_kept(images[-1], known, values, task.side).sum())
    for line in describe(results, settings.iters):
        say(line)
    for file in write_out(out, trajectory, results, settings, known):
        say(f"wrote {file}")
    return results


def summarise(trajectory: Trajectory) -> dict:
    """Counts and intervals, ready for JSON."""
    before, after = trajectory.valid[0], trajectory.valid[-1]
    return {
        "boards": len(before),
        "valid_before": int(before.sum()),
        "valid_after": int(after.sum()),
        "share_before": intervals.share(before),
        "share_after": intervals.share(after),
        "gain": intervals.paired_gain(before, after),
        "fixed": int((after & ~before).sum()),
        "broken": int((before & ~after).sum()),
        "valid_by_iteration": trajectory.valid.sum(1).tolist(),
        "mean_violations_by_iteration": trajectory.violations.double().mean(1).tolist(),
    }


def describe(results: dict, iters: int) -> list[str]:
    """The results as lines for a person."""
    n, before, after = results["boards"], results["valid_before"], results["valid_after"]
    refined = f"after {_many(iters, 'iteration')}"
    fixed, broken, seconds = results["fixed"], results["broken"], results["seconds"]
    kept = [f"  clue cells untouched on {results['clues_kept']} of {n} boards"] if "clues_kept" in results else []
    return [
        "",
        f"  {'after one pass':22}{before:5d} of {n} valid   {results['share_before'].percent()}",
        f"  {refined:22}{after:5d} of {n} valid   {results['share_after'].percent()}",
        f"  {'gain':22} {results['gain'].points()}   (paired; intervals are 95 %)",
        f"  {_many(fixed, 'board')} fixed, {broken} broken; {seconds} s of generating and refining",
        f"  judged by a reader that reads {100 * results['reader_accuracy']:.1f} % of held-out digits right",
        *kept,
        "",
    ]


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def write_out(
    out: Path, trajectory: Trajectory, results: dict, settings: DemoSettings, known: Tensor | None
) -> list[Path]:
    """Write the pictures and the numbers; returns the files."""
    boards, validity, numbers = out / "boards.png", out / "validity.png", out / "results.json"
    numbers.write_text(json.dumps({"settings": vars(settings), **results}, indent=2) + "\n")
    invalid_first = (~trajectory.valid[0]).nonzero().flatten().tolist()
    chosen = (invalid_first + trajectory.valid[0].nonzero().flatten().tolist())[:6]
    last = settings.iters
    shown = sorted({0, *(i for i in (1, 2, 3, 5, 10, 20, 50, 100) if i < last), last})
    plots.plot_boards(boards, trajectory.images, trajectory.violating_cells, known, shown, chosen)
    plots.plot_validity(validity, trajectory.valid, title=f"{results['boards']} boards, alpha = {settings.ratio:g}")
    return [boards, validity, numbers]
