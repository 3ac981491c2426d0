"""Grids of Sudoku: valid ones, found by a randomised search and multiplied by the symmetries of the rules.

A grid of side n (4 or 9) is (n, n) int64 with digits 1..n. Its boxes lie in bands (box rows) and stacks (box columns).
"""

from __future__ import annotations

import random
from functools import cache

import torch
from torch import Tensor

SIDES = (4, 9)


def box_side(side: int) -> int:
    """The side of a box: 2 for boards of side 4, 3 for boards of side 9."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    return {4: 2, 9: 3}[side]


def random_grids(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Valid grids (count, side, side): for side 4 uniform over all 288, for side 9 from a randomised search.

    On the CPU, as its generator: a grid of side 9 takes about a millisecond. `transformed` makes more of them at once.
    """
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


def transformed(grids: Tensor, generator: torch.Generator) -> Tensor:
    """Each valid grid (B, n, n) under a random symmetry of its own, valid again; on the device of grids and generator.

    The digits are relabelled, bands and the rows within each permuted, stacks and columns likewise, and half of the
    grids transposed: 9! * 6**8 * 2, or 1.2e12, symmetries for side 9, drawn uniformly.
    """
    batch, side, _ = grids.shape
    label = _permutations((batch,), side, generator) + 1
    grids = label.gather(1, grids.flatten(1) - 1).view_as(grids)
    rows, columns = (_line_permutations(batch, side, generator) for _ in range(2))
    grids = grids.gather(1, rows[:, :, None].expand_as(grids)).gather(2, columns[:, None].expand_as(grids))
    flip = torch.rand(batch, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(flip, grids.transpose(1, 2), grids)


def _line_permutations(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """Permutations (batch, n) of rows (or columns) that keep those of a band together."""
    box = box_side(side)
    band = _permutations((batch,), side // box, generator)
    within = _permutations((batch, side // box), box, generator)
    return (band[..., None] * box + within).flatten(1)


def _permutations(shape: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    """Permutations (*shape, n) of 0..n-1."""
    return torch.rand(*shape, n, generator=generator, device=generator.device).argsort(-1)


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
