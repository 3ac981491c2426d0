"""Sudoku boards of handwritten digits: drawing them, choosing clues, and judging boards.

A board of side n (4 or 9) is an image of n x n cells; a cell is a patch. Grids are (B, n, n) int64 with digits 1..n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.digits import DigitReader, Digits, jittered, load_digits
from ipr_fast.tasks.grids import GridSource, box_side


class BoardReport(NamedTuple):
    """Rule violations of each board.

    valid            (B,) bool: every row, column and box has each digit 1..n once
    violations       (B,) int64: missing digits, summed over all rows, columns and boxes; 0 for a valid board
    violating_cells  (B, n, n) bool: cells whose digit is repeated in their row, column or box, or is not in 1..n
    """

    valid: Tensor
    violations: Tensor
    violating_cells: Tensor

    @property
    def good(self) -> Tensor:
        return self.valid

    def measures(self) -> dict[str, Tensor]:
        return {"violations": self.violations}


def board_grid(side: int, cell: int) -> PatchGrid:
    """Return the patch grid of boards with `side` cells a side, of `cell` pixels a side."""
    box_side(side)
    return PatchGrid(1, side * cell, side * cell, cell)


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_boards(grids: Tensor, digits: Digits, generator: torch.Generator) -> Tensor:
    """Draw grids (B, n, n) as boards (B, 1, H, W), each cell as a random image of its digit."""
    return assemble(digits.draw(grids, generator))


def assemble(cells: Tensor) -> Tensor:
    """Join images of cells (B, n, n, size, size) into boards (B, 1, n * size, n * size)."""
    return cells.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[:, None]


def random_clues(batch: int, side: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Draw clue cells (B, N) bool at random places; their number is uniform in low..high for each board."""
    cells = side * side
    if not 0 <= low <= high <= cells:
        raise ValueError(f"clues must satisfy 0 <= low <= high <= {cells}, got {low} and {high}")
    number = torch.randint(low, high + 1, (batch, 1), generator=generator, device="cpu")
    return torch.rand(batch, cells, generator=generator, device="cpu").argsort(1).argsort(1) < number


# ---------------------------------------------------------------------------------------------------------- judging


def read_boards(images: Tensor, reader: DigitReader, side: int) -> Tensor:
    """Read the digits 0..9 of boards (B, 1, H, W): (B, n, n)."""
    grid = board_grid(side, images.shape[-1] // side)
    return reader.read(grid.to_patches(images).unflatten(-1, (grid.patch_size, -1))).unflatten(1, (side, side))


def check_grids(grids: Tensor) -> BoardReport:
    """Judge grids (B, n, n) of any integers."""
    box = box_side(grids.shape[-1])
    batch, side, _ = grids.shape
    one_hot = grids[..., None] == torch.arange(1, side + 1, device=grids.device)  # (B, n, n, digit)
    in_boxes = one_hot.reshape(batch, side // box, box, side // box, box, side)
    row, column, square = one_hot.sum(2), one_hot.sum(1), in_boxes.sum((2, 4))  # count of each digit in each group
    violations = torch.stack([(group == 0).flatten(1).sum(1) for group in (row, column, square)]).sum(0)
    square = square.repeat_interleave(box, 1).repeat_interleave(box, 2)
    repeated = (row[:, :, None] > 1) | (column[:, None] > 1) | (square > 1)
    violating = (one_hot & repeated).any(-1) | ~one_hot.any(-1)
    return BoardReport(violations == 0, violations, violating)


def clues_kept(images: Tensor, known: Tensor, known_values: Tensor, side: int) -> Tensor:
    """Whether every pixel of every clue cell equals the given one: (B,) bool."""
    grid = board_grid(side, images.shape[-1] // side)
    same = (grid.to_patches(images) == grid.to_patches(known_values)).all(-1)
    return (same | ~known.reshape(same.shape)).all(1)


@dataclass(frozen=True)
class BoardJudge:
    """Judges boards by the digits that a reader sees in them."""

    side: int
    reader: DigitReader
    reader_accuracy: float  # on held-out digits

    @classmethod
    def from_digits(cls, side: int, train: Digits, test: Digits) -> BoardJudge:
        reader = DigitReader(train)
        return cls(side, reader, reader.accuracy(test))

    def read(self, images: Tensor) -> Tensor:
        """Read the digits 0..9 of boards (B, 1, H, W): (B, n, n). Raises ValueError for another shape."""
        pixels = self.side * self.reader.size
        checks.judged(self, images, 1, pixels, pixels)
        return read_boards(images, self.reader, self.side)

    def __call__(self, images: Tensor) -> BoardReport:
        """Judge boards (B, 1, H, W)."""
        return check_grids(self.read(images))

    @property
    def note(self) -> str:
        return f"judged by a reader that reads {100 * self.reader_accuracy:.1f} % of held-out digits right"


# ---------------------------------------------------------------------------------------------------------- the task


class DigitSudoku:
    """The task of Sudoku boards in handwritten digits: 8x8 cells, or MNIST's 28x28 with the folder of its files.

    Side 4: all 288 grids, with the training digits as they are. Side 9: a few thousand grids found by a search, under
    random symmetries, with jittered digits.
    """

    noun, adjective = "board", "valid"

    def __init__(self, side: int, mnist: str | None = None) -> None:
        checks.folder("mnist", mnist)
        self.side = self.num_symbols = side
        self.train, self.test = load_digits("train", mnist), load_digits("test", mnist)
        self.grid = board_grid(side, self.train.size)
        self.name = f"digit-sudoku-{side}x{side}" + ("" if mnist is None else "-mnist")
        self._grids = GridSource(side)
        self._digits: dict[torch.device, Digits] = {}

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw random valid boards (B, 1, H, W) in training digits, on the generator's device."""
        return self.sample_with_symbols(batch_size, generator)[0]

    def sample_with_symbols(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the boards of `sample`, and the digit of each cell less one, (B, N) int64."""
        checks.integer("batch_size", batch_size, 0)
        grids, digits = self._grids.draw(batch_size, generator), self._digits_on(generator.device)
        if self.side == 4:
            return draw_boards(grids, digits, generator), grids.flatten(1) - 1
        return assemble(jittered(digits.draw(grids, generator), generator)), grids.flatten(1) - 1

    def read_symbols(self, samples: Tensor) -> Tensor:
        """Read the digit of each cell of boards (B, 1, H, W), less one: (B, N) int64, -1 for a 0."""
        return self.judge().read(samples).flatten(1) - 1

    def judge(self) -> BoardJudge:
        """Return a judge of boards whose reader has seen the training digits only."""
        return BoardJudge.from_digits(self.side, self.train, self.test)

    def _digits_on(self, device: torch.device) -> Digits:
        """Return the training digits on a device, moved on first use."""
        if device not in self._digits:
            self._digits[device] = self.train.to(device)
        return self._digits[device]
