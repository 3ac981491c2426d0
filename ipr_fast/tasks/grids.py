"""Valid Sudoku grids: found by a randomised search and multiplied by the symmetries of the rules.

A grid of side n (4 or 9) is (n, n) int64 with digits 1..n. A band is a row of boxes, a stack a column of boxes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

SIDES = (4, 9)
BASE_GRIDS = 4096  # grids of side 9 to search for, in a few seconds; each has 1.2e12 symmetries


def box_side(side: int) -> int:
    """Return the side of a box: 2 for grids of side 4, 3 for side 9. Raises ValueError for another side."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    return {4: 2, 9: 3}[side]


def random_grids(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw valid grids (count, side, side): for side 4 uniformly from all 288, for side 9 by a randomised search.

    Grids and generator are on the CPU. A grid of side 9 takes about a millisecond; `transformed` is faster.
    """
    if side == 4:
        grids = all_grids(4)
        return grids[torch.randint(len(grids), (count,), generator=generator, device="cpu")]
    box_side(side)
    rng = random.Random(int(torch.randint(2**62, (), generator=generator, device="cpu")))
    found = [next(_search(side, rng)) for _ in range(count)]
    return torch.tensor(found, dtype=torch.int64, device="cpu").reshape(count, side, side)


@cache
def all_grids(side: int) -> Tensor:
    """List every valid grid of side 4: (288, 4, 4)."""
    if side != 4:
        raise ValueError(f"only the grids of side 4 can be listed, got side {side!r}")
    return torch.tensor(list(_search(4, None)), dtype=torch.int64, device="cpu").reshape(-1, 4, 4)


class GridSource:
    """Grids to train on: for side 4 all 288, for side 9 some that a search finds once, under random symmetries."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._base: dict[torch.device, Tensor] = {}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw valid grids (count, side, side) on the generator's device."""
        base = self._on(generator.device)
        grids = base[torch.randint(len(base), (count,), generator=generator, device=generator.device)]
        return grids if self.side == 4 else transformed(grids, generator)

    def _on(self, device: torch.device) -> Tensor:
        """Return the base grids on a device, made on first use."""
        if device not in self._base:
            self._base[device] = (all_grids(4) if self.side == 4 else _base_grids(self.side, BASE_GRIDS)).to(device)
        return self._base[device]


@cache
def _base_grids(side: int, count: int) -> Tensor:
    return random_grids(count, side, torch.Generator("cpu").manual_seed(0))


def transformed(grids: Tensor, generator: torch.Generator) -> Tensor:
    """Apply to each valid grid (B, n, n) a random symmetry of its own; grids and generator are on one device.

    A symmetry relabels the digits, permutes bands and the rows within each, stacks and the columns within each, and
    transposes half of the grids. It is drawn uniformly: for side 9 from 9! * 6**8 * 2 = 1.2e12.
    """
    batch, side, _ = grids.shape
    label = _permutations((batch,), side, generator) + 1
    grids = label.gather(1, grids.flatten(1) - 1).view_as(grids)
    rows, columns = (_line_permutations(batch, side, generator) for _ in range(2))
    grids = grids.gather(1, rows[:, :, None].expand_as(grids)).gather(2, columns[:, None].expand_as(grids))
    flip = torch.rand(batch, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(flip, grids.transpose(1, 2), grids)


def _line_permutations(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw permutations (batch, n) of rows or columns that keep the lines of a band together."""
    box = box_side(side)
    band = _permutations((batch,), side // box, generator)
    within = _permutations((batch, side // box), box, generator)
    return (band[..., None] * box + within).flatten(1)


def _permutations(shape: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    """Draw permutations (*shape, n) of 0..n-1."""
    return torch.rand(*shape, n, generator=generator, device=generator.device).argsort(-1)


def _search(side: int, rng: random.Random | None) -> Iterator[list[int]]:
    """Yield valid grids as lists of digits, by a depth-first search that fills the cell with the fewest candidates.

    With `rng`, candidates are tried in random order, so the first grid found is a random one.
    """
    box, cells = box_side(side), side * side
    groups = [(i // side, side + i % side, 2 * side + (i // side // box) * box + i % side // box) for i in range(cells)]
    full = (1 << side) - 1
    free = [full] * (3 * side)  # bit set of the digits that each row, column and box still lacks
    grid = [0] * cells

    def fill(empty: list[int]) -> Iterator[list[int]]:
        if not empty:
            yield list(grid)
            return
        cell, candidates, fewest = -1, 0, side + 1
        for each in empty:  # the search's time is spent here
            row, column, square = groups[each]
            found = free[row] & free[column] & free[square]
            count = found.bit_count()
            if count < fewest:
                cell, candidates, fewest = each, found, count
                if not count:
                    return
        rest = [c for c in empty if c != cell]
        digits = [d for d in range(side) if candidates >> d & 1]
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
