import math

import pytest
import torch

from ipr_fast.tasks.grids import all_grids, box_side, random_grids, transformed
from ipr_fast.tasks.sudoku import check_grids


def orbit_of(grid):
    """Return all grids of side 4 that symmetries make of one, by applying generators until nothing is new."""
    exchanges = [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)]  # of rows within a band, and of bands
    found, new = {grid}, [grid]
    while new:
        rows = new.pop()
        made = [tuple(rows[i] for i in order) for order in exchanges]
        made += [tuple(tuple(row[i] for i in order) for row in rows) for order in exchanges]
        made += [tuple(zip(*rows, strict=True))]
        for a in range(1, 4):
            label = {a: a + 1, a + 1: a}
            made += [tuple(tuple(label.get(digit, digit) for digit in row) for row in rows)]
        new += set(made) - found
        found |= set(made)
    return found


def as_tuples(grids):
    return [tuple(map(tuple, grid)) for grid in grids.tolist()]


def marked_grid(side):
    """Make an invalid grid in which counting identifies every row, column and digit.

    Row r holds the digit 1 in its first r + 1 cells; the digits 2, 3, 4, ... fill 1, 2, 3, ... of the other cells.
    """
    grid, others = torch.ones(side, side, dtype=torch.int64), torch.triu_indices(side, side, 1)
    grid[others[0], others[1]] = torch.repeat_interleave(torch.arange(2, side + 1), torch.arange(1, side))
    return grid


def symmetries(grids):
    """Recover (labels, rows, columns, flipped) by which `transformed` made grids (B, n, n) of the marked grid."""
    side = grids.shape[-1]
    count = (grids.flatten(1)[..., None] == torch.arange(1, side + 1)).sum(1)  # 1, 2, 3, ..., n(n + 1) / 2
    labels = count.argsort(1).roll(1, dims=1) + 1  # those of 1, 2, 3, ...
    marked = labels.argsort(1).gather(1, grids.flatten(1) - 1).view_as(grids) + 1
    row_of_two = (marked == 2).any(2).long().argmax(1)
    flipped = (marked == 1).sum(2).gather(1, row_of_two[:, None])[:, 0] != 1  # the only 2 stands in row 0, column 1
    marked = torch.where(flipped[:, None, None], marked.transpose(1, 2), marked)
    return labels, (marked == 1).sum(2) - 1, side - (marked == 1).sum(1), flipped


def assert_uniform(outcomes, kinds):
    """Test outcomes 0..kinds-1 by Pearson's chi-squared, at a false-alarm probability of one in a million.

    Bound: Laurent & Massart 2000, P(X >= k + 2 sqrt(k x) + 2 x) <= exp(-x).
    """
    count, expected = outcomes.bincount(minlength=kinds).double(), len(outcomes) / kinds
    assert len(count) == kinds
    assert expected >= 20
    k, x = kinds - 1, math.log(1e6)
    assert ((count - expected) ** 2).sum().item() / expected < k + 2 * math.sqrt(k * x) + 2 * x


def index_of(permutations):
    """Number permutations (B, n), n < 7, from 0 to n!-1."""
    listed = torch.cartesian_prod(*[torch.arange(permutations.shape[1])] * permutations.shape[1])
    listed = listed[(listed.sort(1).values == torch.arange(permutations.shape[1])).all(1)]
    return (permutations[:, None] == listed).all(2).long().argmax(1)


# ------------------------------------------------------------------------------------------------- lists and searches


def test_there_are_288_grids_of_side_4():
    grids = all_grids(4)
    assert len(grids.reshape(-1, 16).unique(dim=0)) == len(grids) == 288
    assert check_grids(grids).valid.all()


@pytest.mark.parametrize("side", [4, 9])
def test_random_grids_are_valid_and_follow_the_generator(side):
    draw = [random_grids(40, side, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert check_grids(draw[0]).valid.all()
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert random_grids(0, side, torch.Generator()).shape == (0, side, side)


def test_random_grids_of_side_4_are_uniform_over_all(generator):
    drawn = random_grids(288 * 30, 4, generator).flatten(1)
    assert_uniform((drawn[:, None] == all_grids(4).flatten(1)).all(2).long().argmax(1), 288)


def test_grids_of_side_9_are_not_one_pattern_permuted(generator):
    """With the first row relabelled 1..9, permutations of one pattern would have few different second rows."""
    grids = random_grids(60, 9, generator)
    relabel = torch.zeros(60, 10, dtype=torch.long).scatter_(1, grids[:, 0], torch.arange(1, 10).expand(60, 9))
    canonical = relabel.gather(1, grids.flatten(1))
    assert len(canonical.unique(dim=0)) == 60
    bands = canonical.reshape(60, 9, 9)[:, 1:3].sort(dim=1).values
    cells_in_first_box = bands[:, :, :3].flatten(1).sort(dim=1).values
    assert len(cells_in_first_box.unique(dim=0)) == 1  # every first box holds 1..9
    rows_mixed = [{tuple(sorted(row[:3].tolist())) for row in grid[1:3]} for grid in canonical.reshape(60, 9, 9)]
    assert len({frozenset(rows) for rows in rows_mixed}) > 5


def test_boxes_are_as_wide_as_bands_are_many():
    assert {side: box_side(side) for side in (4, 9)} == {4: 2, 9: 3}


@pytest.mark.parametrize("side", [0, 3, 16, "4", None])
def test_other_sides_are_refused(side, generator):
    with pytest.raises(ValueError, match=r"side must be one of \(4, 9\), got"):
        box_side(side)
    with pytest.raises(ValueError, match=r"side must be one of \(4, 9\), got"):
        random_grids(0, side, generator)


def test_grids_of_side_9_cannot_be_listed():
    with pytest.raises(ValueError, match="only the grids of side 4 can be listed, got side 9"):
        all_grids(9)


# ---------------------------------------------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("side", [4, 9])
def test_transformed_grids_are_valid_and_follow_the_generator(side, generator):
    grids = random_grids(50, side, generator)
    kept = grids.clone()
    draw = [transformed(grids, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draw[0].shape == grids.shape
    assert draw[0].dtype == torch.int64
    assert check_grids(draw[0]).valid.all()
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert torch.equal(grids, kept)


@pytest.mark.parametrize("side", [4, 9])
def test_transforming_no_grids_gives_none(side, generator):
    empty = transformed(torch.zeros(0, side, side, dtype=torch.int64), generator)
    assert empty.shape == (0, side, side)
    assert empty.dtype == torch.int64


def test_each_grid_of_a_batch_gets_a_symmetry_of_its_own(generator):
    """Two of 1,000 symmetries out of 1.2e12 are equal once in two million batches."""
    one = random_grids(1, 9, generator).expand(1000, 9, 9)
    assert len(transformed(one, generator).flatten(1).unique(dim=0)) == 1000


def test_the_grids_of_side_4_fall_into_two_orbits_and_each_is_drawn_from_evenly(generator):
    grids = as_tuples(all_grids(4))
    orbits = {frozenset(orbit_of(grid)) for grid in grids}
    assert sorted(map(len, orbits)) == [96, 192]
    assert set().union(*orbits) == set(grids)
    for orbit in orbits:
        number = {grid: i for i, grid in enumerate(sorted(orbit))}
        start = torch.tensor(min(orbit)).expand(30 * len(orbit), 4, 4)
        assert_uniform(torch.tensor([number[grid] for grid in as_tuples(transformed(start, generator))]), len(orbit))


@pytest.mark.parametrize("side", [4, 9])
def test_symmetries_permute_labels_lines_and_bands_and_nothing_else(side, generator):
    grid = marked_grid(side)
    grids = transformed(grid.expand(500, side, side), generator)
    for made, label, rows, columns, flip in zip(grids, *symmetries(grids), strict=True):
        box = box_side(side)
        for lines in (rows, columns):
            assert lines.sort().values.tolist() == list(range(side))
            assert (lines.reshape(-1, box) // box).diff(dim=1).eq(0).all()  # bands stay together
        wanted = label[grid[rows][:, columns] - 1]
        assert torch.equal(made, wanted.T if flip else wanted)


@pytest.mark.parametrize("side", [4, 9])
def test_every_part_of_a_symmetry_is_uniform(side, generator):
    """Relabelling, order of bands, order within each band, the same for columns, and transposition."""
    box, count = box_side(side), 6000
    labels, rows, columns, flipped = symmetries(transformed(marked_grid(side).expand(count, side, side), generator))
    orders, parts = math.factorial(box), []
    for lines in (rows, columns):
        parts.append((index_of(lines[:, ::box] // box), orders))
        parts += [(index_of(band % box), orders) for band in lines.split(box, dim=1)]
    parts.append((flipped.long(), 2))
    parts += [(labels[:, digit] - 1, side) for digit in range(side)]
    pairs = side * (side - 1)
    for digit in range(side - 1):
        a, b = labels[:, digit] - 1, labels[:, digit + 1] - 1
        parts.append((a * (side - 1) + b - (b > a).long(), pairs))
    for outcomes, kinds in parts:
        assert_uniform(outcomes, kinds)
    for i, (first, kinds) in enumerate(
        parts
    ):  # and no two parts depend on each other, but for those of one relabelling
        for second, others in parts[i + 1 : 2 * (len(rows[0]) // box + 1) + 1]:
            assert_uniform(first * others + second, kinds * others)
