"""Pictures: samples over the iterations of refinement, the share of good ones, and the means of measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ipr_fast.errors import import_extra
from ipr_fast.evaluation import intervals
from ipr_fast.outputs import replacing
from ipr_fast.tasks.grids import box_side

MATPLOTLIB = ("matplotlib", "plots", "pictures")
WRONG_PAPER, CLUE_PAPER = (1.0, 0.72, 0.72), (0.80, 0.88, 1.0)
PAPER, INK, RED, GREEN, GREY = "#ffffff", "#1b1f24", "#d1242f", "#1a7f37", "#6e7781"


def plot_boards(
    path: str | Path,
    images: Tensor,
    violating: Tensor,
    known: Tensor | None,
    iterations: Sequence[int],
    chosen: Sequence[int],
    first: str = "one pass",
) -> None:
    """Draw a row for each board of `chosen`, a column for each of `iterations`; violating cells red, clues blue.

    images (R + 1, B, 1, H, W) and violating (R + 1, B, n, n) bool, for iterations 0..R; known (B, n * n) bool. first:
    the title of iteration 0.
    """
    side = violating.shape[-1]

    def draw(axis: Any, iteration: int, board: int, wrong: Tensor, clues: Tensor) -> None:
        picture = _tinted(images[iteration, board, 0], wrong, clues).numpy()
        axis.imshow(picture, interpolation="nearest", extent=(0, side, side, 0))

    _draw_boards(path, draw, violating, known, iterations, chosen, first)


def plot_grids(
    path: str | Path,
    tokens: Tensor,
    violating: Tensor,
    known: Tensor | None,
    iterations: Sequence[int],
    chosen: Sequence[int],
    first: str = "one pass",
) -> None:
    """Draw boards of tokens (R + 1, B, n * n) as `plot_boards` does; a token is the digit of a cell, 0 an empty one."""
    side = violating.shape[-1]
    grids = tokens.unflatten(-1, (side, side))

    def draw(axis: Any, iteration: int, board: int, wrong: Tensor, clues: Tensor) -> None:
        paper = torch.ones(side, side, 3, device="cpu")
        paper[wrong] = torch.tensor(WRONG_PAPER, device="cpu")
        paper[clues] = torch.tensor(CLUE_PAPER, device="cpu")
        axis.imshow(paper.numpy(), interpolation="nearest", extent=(0, side, side, 0))
        for row in range(side):
            for column in range(side):
                digit, ink = int(grids[iteration, board, row, column]), RED if wrong[row, column] else INK
                text = {"ha": "center", "va": "center_baseline", "fontsize": 54 / side, "color": ink}
                axis.text(column + 0.5, row + 0.54, str(digit or ""), **text)

    _draw_boards(path, draw, violating, known, iterations, chosen, first)


def _draw_boards(
    path: str | Path,
    draw: Callable[[Any, int, int, Tensor, Tensor], None],
    violating: Tensor,
    known: Tensor | None,
    iterations: Sequence[int],
    chosen: Sequence[int],
    first: str,
) -> None:
    """Write a picture of boards by `draw(axis, iteration, board, violating cells, clues)`."""
    side = violating.shape[-1]
    no_clues = torch.zeros(side, side, dtype=torch.bool, device="cpu")

    def draw_board(axis: Any, iteration: int, board: int) -> None:
        wrong = violating[iteration, board]
        draw(axis, iteration, board, wrong, no_clues if known is None else known[board].reshape(side, side))
        _draw_grid(axis, side, GREEN if not wrong.any() else INK)

    clue = "" if known is None else ", blue: a clue"
    legend = f"red: breaks a rule, green frame: valid{clue}"
    _draw_table(path, draw_board, iterations, chosen, legend, (1.35, 1.35), first)


def plot_images(
    path: str | Path,
    images: Tensor,
    good: Tensor,
    measure: tuple[str, Tensor],
    iterations: Sequence[int],
    chosen: Sequence[int],
) -> None:
    """Draw a row for each sample of `chosen`, a column for each of `iterations`, with a measure under each image.

    images (R + 1, B, 1 or 3, H, W), good (R + 1, B) bool; measure: its name and values (R + 1, B); for iterations 0..R.
    """
    name, values = measure

    def draw(axis: Any, iteration: int, sample: int) -> None:
        colour = GREEN if good[iteration, sample] else INK
        picture = (images[iteration, sample].clamp(-1, 1) + 1) / 2
        axis.imshow(picture.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        _frame(axis, colour)
        axis.set_xlabel(f"{values[iteration, sample].item():.4g}", fontsize=8, labelpad=2, color=colour)

    _draw_table(path, draw, iterations, chosen, f"number: {name}, green: good", (1.2, 1.36))


def _draw_table(
    path: str | Path,
    draw: Callable[[Any, int, int], None],
    iterations: Sequence[int],
    chosen: Sequence[int],
    legend: str,
    cell: tuple[float, float],
    first: str = "one pass",
) -> None:
    """Write a picture of `draw(axis, iteration, sample)`, samples in rows; cell: width and height in inches."""
    size = max(cell[0] * len(iterations), 3.6) + 0.3, cell[1] * len(chosen) + 0.7
    figure, axes = load_pyplot().subplots(
        len(chosen), len(iterations), figsize=size, squeeze=False, layout="constrained"
    )
    for row, sample in zip(axes, chosen, strict=True):
        for axis, iteration in zip(row, iterations, strict=True):
            draw(axis, iteration, sample)
    for axis, iteration in zip(axes[0], iterations, strict=True):
        axis.set_title(first if iteration == 0 else f"after {iteration}", fontsize=9, color=INK)
    figure.suptitle(f"Iterations of refinement\n{legend}", fontsize=9, color=INK)
    save_figure(figure, path)


def plot_good(path: str | Path, good: Tensor, noun: str, *, title: str, first: str = "one pass") -> None:
    """Draw the share of good samples, called `noun`, and its 95 % interval over the iterations; good (R + 1, B).

    first: what the samples were before the iterations.
    """
    pyplot = load_pyplot()
    shares = torch.tensor([intervals.share(v) for v in good], dtype=torch.float64, device="cpu")
    value, low, high = (100 * shares.T).tolist()
    steps = range(len(value))
    figure, axis = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    axis.fill_between(steps, low, high, color=GREEN, alpha=0.18, linewidth=0, label="95 % interval")
    reached = f"refined: {value[-1]:.1f} % after {steps[-1]}"
    axis.plot(steps, value, color=GREEN, marker="o", markersize=3.5, label=reached)
    axis.axhline(value[0], color=GREY, linestyle="--", linewidth=1, label=f"{first}: {value[0]:.1f} %")
    axis.set(xlabel="iteration", ylabel=f"{noun} (%)", xlim=(0, max(1, steps[-1]) * 1.04))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(max(-2, min(low) - 5), min(102, max(high) + 5))
    axis.set_title(title, fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
    save_figure(figure, path)


def plot_measures(path: str | Path, measures: Mapping[str, Tensor], *, title: str) -> None:
    """Draw the mean of each measure (R + 1, B), by its name, and its 95 % interval over the iterations."""
    figure, axes = load_pyplot().subplots(
        1, len(measures), figsize=(2.7 * len(measures), 2.6), squeeze=False, layout="constrained"
    )
    for axis, (name, values) in zip(axes[0], measures.items(), strict=True):
        means = [intervals.mean(v) for v in values]
        value, low, high = ([mean[i] for mean in means] for i in range(3))
        steps = range(len(means))
        if values.shape[1] > 1:  # one sample has no interval
            axis.fill_between(steps, low, high, color=GREEN, alpha=0.18, linewidth=0)
        axis.plot(steps, value, color=GREEN, marker="o", markersize=3)
        axis.axhline(value[0], color=GREY, linestyle="--", linewidth=1)
        axis.set(xlabel="iteration", xlim=(0, max(1, steps[-1]) * 1.04))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{name}\n{value[0]:.3g} to {value[-1]:.3g}", fontsize=9, color=INK)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK)
    save_figure(figure, path)


def _tinted(image: Tensor, wrong: Tensor, clues: Tensor) -> Tensor:
    """Return a board (H, W) in [-1, 1] as RGB (H', W', 3), with gaps between cells; `wrong` red, `clues` blue."""
    side = wrong.shape[0]
    margin = max(1, image.shape[0] // side // 8)
    cells = image.unflatten(1, (side, -1)).unflatten(0, (side, -1)).permute(0, 2, 1, 3)
    cells = torch.nn.functional.pad(cells.float(), (margin,) * 4, value=-1.0)
    cell = cells.shape[-1]
    image = cells.permute(0, 2, 1, 3).reshape(side * cell, side * cell)
    ink = ((image.clamp(-1, 1) + 1) / 2)[..., None]
    is_wrong, is_clue = (m.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[..., None] for m in (wrong, clues))
    paper = torch.where(is_wrong, image.new_tensor(WRONG_PAPER), 1.0)
    paper = torch.where(is_clue, image.new_tensor(CLUE_PAPER), paper)  # a clue that breaks a rule has red ink alone
    colour = torch.where(is_wrong, image.new_tensor([0.66, 0.05, 0.10]), image.new_tensor([0.10, 0.12, 0.14]))
    return paper * (1 - ink) + colour * ink


def _draw_grid(axis: Any, side: int, frame: str) -> None:
    box = box_side(side)
    for line in range(1, side):
        width = 1.2 if line % box == 0 else 0.35
        axis.axhline(line, color=GREY, linewidth=width)
        axis.axvline(line, color=GREY, linewidth=width)
    _frame(axis, frame)


def _frame(axis: Any, frame: str) -> None:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=frame, linewidth=2.2 if frame == GREEN else 1.2)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG and close it."""
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=150, facecolor=PAPER)
    finally:
        load_pyplot().close(figure)


def load_pyplot() -> ModuleType:
    """Import matplotlib.pyplot with the Agg backend; raise MissingExtra or BrokenExtra where that fails."""
    import_extra("matplotlib", *MATPLOTLIB).use("Agg")
    return import_extra("matplotlib.pyplot", *MATPLOTLIB)
