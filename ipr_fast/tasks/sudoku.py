"""Sudoku boards of handwritten digits: pictures of grids, clues, and what is wrong with a board.

A board of side n (4 or 9) is an image of n x n cells, a cell is one patch. Grids are (B, n, n) int64 with digits 1..n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.digits import DigitReader, Digits, jittered, load_digits
from ipr_fast.tasks.grids import all_grids, box_side, random_grids, transformed

BASE_GRIDS = 4096  # of side 9, from a search of a few seconds; each has 1.2e12 symmetries


class BoardReport(NamedTuple):
    """What is wrong with each board.

    valid            (B,) bool: every row, column and box holds each digit 1..n once
    violations       (B,) int64: digits missing, summed over all rows, columns and boxes; 0 for a valid board
    violating_cells  (B, n, n) bool: cells whose digit stands again in the same row, column or box, or is not in 1..n
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
    """The patch grid of boards of `side` cells of `cell` pixels a side."""
    box_side(side)
    return PatchGrid(1, side * cell, side * cell, cell)


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_boards(grids: Tensor, digits: Digits, generator: torch.Generator) -> Tensor:
    """Pictures (B, 1, H, W) of grids (B, n, n), every cell a random image of its digit."""
    return assemble(digits.draw(grids, generator))


def assemble(cells: Tensor) -> Tensor:
    """Pictures of cells (B, n, n, size, size) as boards (B, 1, n * size, n * size)."""
    return cells.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[:, None]


def random_clues(batch: int, side: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Clue cells (B, N) bool at random places, their number uniform in low..high for each board."""
    cells = side * side
    if not 0 <= low <= high <= cells:
        raise ValueError(f"clues must satisfy 0 <= low <= high <= {cells}, got {low} and {high}")
    number = torch.randint(low, high + 1, (batch, 1), generator=generator)
    return torch.rand(batch, cells, generator=generator).argsort(1).argsort(1) < number


# ---------------------------------------------------------------------------------------------------------- judging


def read_boards(images: Tensor, reader: DigitReader, side: int) -> Tensor:
    """The digits 0..9 that boards (B, 1, H, W) show, (B, n, n)."""
    grid = board_grid(side, images.shape[-1] // side)
    return reader.read(grid.to_patches(images).unflatten(-1, (grid.patch_size, -1))).unflatten(1, (side, side))


def check_grids(grids: Tensor) -> BoardReport:
    """Judge grids (B, n, n) of any integers."""
    box = box_side(grids.shape[-1])
    batch, side, _ = grids.shape
    digit = torch.arange(1, side + 1, device=grids.device)
    shows = grids[..., None] == digit  # (B, n, n, digit)
    boxed = shows.reshape(batch, side // box, box, side // box, box, side)
    row, column, square = shows.sum(2), shows.sum(1), boxed.sum((2, 4))  # how often each digit stands in each group
    violations = sum((group == 0).flatten(1).sum(1) for group in (row, column, square))
    square = square.repeat_interleave(box, 1).repeat_interleave(box, 2)
    repeated = (row[:, :, None] > 1) | (column[:, None] > 1) | (square > 1)
    violating = (shows & repeated).any(-1) | ~shows.any(-1)
    return BoardReport(violations == 0, violations, violating)


def clues_kept(images: Tensor, known: Tensor, known_values: Tensor, side: int) -> Tensor:
    """(B,) bool: every pixel of every clue cell equals the given one."""
    grid = board_grid(side, images.shape[-1] // side)
    same = (grid.to_patches(images) == grid.to_patches(known_values)).all(-1)
    return (same | ~known.reshape(same.shape)).all(1)


@dataclass(frozen=True)
class BoardJudge:
    """Judges pictures of boards with a reader, and knows how far to trust it."""

    side: int
    reader: DigitReader
    reader_accuracy: float  # on held-out digits

    @classmethod
    def from_digits(cls, side: int, train: Digits, test: Digits) -> BoardJudge:
        reader = DigitReader(train)
        return cls(side, reader, reader.accuracy(test))

    def __call__(self, images: Tensor) -> BoardReport:
        """Judge boards (B, 1, H, W)."""
        return check_grids(read_boards(images, self.reader, self.side))

    @property
    def note(self) -> str:
        return f"judged by a reader that reads {100 * self.reader_accuracy:.1f} % of held-out digits right"


# ---------------------------------------------------------------------------------------------------------- the task


class DigitSudoku:
    """Boards of handwritten digits as a training task; 8x8 cells, or MNIST's 28x28 with the folder of its files.

    Side 4: all grids, the training digits as they are. Side 9: a few thousand grids found by a search, each time under
    another symmetry, the digits jittered. The boards are made on the device of the generator.
    """

    noun, adjective = "board", "valid"

    def __init__(self, side: int, mnist: str | None = None) -> None:
        self.side = side
        self.train, self.test = load_digits("train", mnist), load_digits("test", mnist)
        self.grid = board_grid(side, self.train.size)
        self.name = f"digit-sudoku-{side}x{side}" + ("" if mnist is None else "-mnist")
        self._sources: dict[torch.device, tuple[Tensor, Digits]] = {}

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Pictures (B, 1, H, W) of random valid boards in training digits, on the generator's device."""
        base, digits = self._source(generator.device)
        grids = base[torch.randint(len(base), (batch_size,), generator=generator, device=generator.device)]
        if self.side == 4:
            return draw_boards(grids, digits, generator)
        cells = digits.draw(transformed(grids, generator), generator)
        return assemble(jittered(cells, generator))

    def judge(self) -> BoardJudge:
        """A judge of boards, whose reader has seen the training digits only."""
        return BoardJudge.from_digits(self.side, self.train, self.test)

    def _source(self, device: torch.device) -> tuple[Tensor, Digits]:
        """The base grids and the training digits on a device, made when first asked for."""
        if device not in self._sources:
            seeded = torch.Generator().manual_seed(0)
            base = all_grids(4) if self.side == 4 else random_grids(BASE_GRIDS, self.side, seeded)
            self._sources[device] = base.to(device), self.train.to(device)
        return self._sources[device]
