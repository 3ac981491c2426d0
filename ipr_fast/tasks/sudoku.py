"""Sudoku boards of handwritten digits: random valid grids, pictures of them, clues, and what is wrong with a board.

A board of side n (4 or 9) is an image of n x n cells, a cell is one patch. Grids are (B, n, n) int64 with digits 1..n.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformerConfig
from ipr_fast.patches import PatchGrid
from ipr_fast.tasks.digits import DigitReader, Digits, load_digits

SIDES = (4, 9)


class BoardReport(NamedTuple):
    """What is wrong with each board.

    valid            (B,) bool: every row, column and box holds each digit 1..n once
    violations       (B,) int64: digits missing, summed over all rows, columns and boxes; 0 for a valid board
    violating_cells  (B, n, n) bool: cells whose digit stands again in the same row, column or box, or is not in 1..n
    """

    valid: Tensor
    violations: Tensor
    violating_cells: Tensor


def box_side(side: int) -> int:
    """The side of a box: 2 for boards of side 4, 3 for boards of side 9."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    return {4: 2, 9: 3}[side]


def board_grid(side: int, cell: int) -> PatchGrid:
    """The patch grid of boards of `side` cells of `cell` pixels a side."""
    box_side(side)
    return PatchGrid(1, side * cell, side * cell, cell)


# ---------------------------------------------------------------------------------------------------------- drawing


def random_grids(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Valid grids (count, side, side): for side 4 uniform over all 288, for side 9 from a randomised search."""
    if side == 4:
        grids = all_grids(4)
        return grids[torch.randint(len(grids), (count,), generator=generator)]
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    box_side(side)
    found = [next(_search(side, rng)) for _ in range(count)]
    return torch.tensor(found, dtype=torch.int64).reshape(count, side, side)


@cache
def all_grids(side: int) -> Tensor:
    """Every valid grid of side 4, (288, 4, 4)."""
    if side != 4:
        raise ValueError(f"only the grids of side 4 can be listed, got side {side!r}")
    return torch.tensor(list(_search(4, None)), dtype=torch.int64).reshape(-1, 4, 4)


def _search(side: int, rng: random.Random | None):
    """Yield valid grids as lists of digits, depth first, always filling the cell with the fewest candidates.

    With `rng`, candidates are tried in random order, so that the first grid found is a random one.
    """
    box, cells = box_side(side), side * side
    groups = [(i // side, side + i % side, 2 * side + (i // side // box) * box + i % side // box) for i in range(cells)]
    full = (1 << side) - 1
    free = [full] * (3 * side)  # the digits each row, column and box still lacks, as bits
    grid = [0] * cells

    def candidates(cell: int) -> int:
        row, column, square = groups[cell]
        return free[row] & free[column] & free[square]

    def fill(empty: list[int]):
        if not empty:
            yield list(grid)
            return
        cell = min(empty, key=lambda c: candidates(c).bit_count())
        rest = [c for c in empty if c != cell]
        digits = [d for d in range(side) if candidates(cell) >> d & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            grid[cell] = digit + 1
            for group in groups[cell]:
                free[group] ^= 1 << digit
            yield from fill(rest)
            for group in groups[cell]:
                free[group] ^= 1 << digit

    yield from fill(list(range(cells)))


def draw_boards(grids: Tensor, digits: Digits, generator: torch.Generator) -> Tensor:
    """Pictures (B, 1, H, W) of grids (B, n, n), every cell a random image of its digit."""
    batch, side, _ = grids.shape
    cells = digits.draw(grids, generator)  # (B, n, n, size, size)
    return cells.permute(0, 1, 3, 2, 4).reshape(batch, 1, side * digits.size, side * digits.size)


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
    violations = sum((group == 0).sum((-2, -1)).reshape(batch, -1).sum(1) for group in (row, column, square))
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


# ---------------------------------------------------------------------------------------------------------- the task


class DigitSudoku:
    """Boards of handwritten digits as a training task; 8x8 cells, or MNIST's 28x28 with the folder of its files."""

    def __init__(self, side: int, mnist: str | None = None) -> None:
        self.side = side
        self.train, self.test = load_digits("train", mnist), load_digits("test", mnist)
        cell = self.train.size
        self.grid = board_grid(side, cell)
        self.name = f"digit-sudoku-{side}x{side}" + ("" if mnist is None else "-mnist")
        self.config = PatchTransformerConfig(
            channels=1, image_size=side * cell, patch_size=cell, box_size=box_side(side)
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Pictures (B, 1, H, W) of random valid boards in training digits."""
        return draw_boards(random_grids(batch_size, self.side, generator), self.train, generator)

    def judge(self) -> BoardJudge:
        """A judge of boards, whose reader has seen the training digits only."""
        return BoardJudge.from_digits(self.side, self.train, self.test)
