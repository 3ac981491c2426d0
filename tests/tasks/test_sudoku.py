import pytest
import torch

from ipr_fast.tasks.digits import load_digits
from ipr_fast.tasks.grids import all_grids, random_grids
from ipr_fast.tasks.sudoku import (
    BoardJudge,
    DigitSudoku,
    board_grid,
    check_grids,
    clues_kept,
    draw_boards,
    random_clues,
    read_boards,
)


@pytest.fixture(scope="module")
def judge():
    return BoardJudge.from_digits(4, load_digits("train"), load_digits("test"))


def check_by_hand(grid):
    """(violations, violating cells) of one grid, by sets and loops."""
    n = len(grid)
    box = {4: 2, 9: 3}[n]
    groups = [[(r, c) for c in range(n)] for r in range(n)] + [[(r, c) for r in range(n)] for c in range(n)]
    groups += [
        [(r + i, c + j) for i in range(box) for j in range(box)] for r in range(0, n, box) for c in range(0, n, box)
    ]
    violations, cells = 0, {(r, c) for r in range(n) for c in range(n) if not 1 <= grid[r][c] <= n}
    for group in groups:
        digits = [grid[r][c] for r, c in group]
        violations += len(set(range(1, n + 1)) - set(digits))
        cells |= {(r, c) for r, c in group if digits.count(grid[r][c]) > 1}
    return violations, cells


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


def test_grids_of_side_9_are_not_one_pattern_permuted(generator):
    """Relabelled so that the first row is 1..9, permutations of one pattern would have few different second rows."""
    grids = random_grids(60, 9, generator)
    relabel = torch.zeros(60, 10, dtype=torch.long).scatter_(1, grids[:, 0], torch.arange(1, 10).expand(60, 9))
    canonical = relabel.gather(1, grids.flatten(1))
    assert len(canonical.unique(dim=0)) == 60
    bands = canonical.reshape(60, 9, 9)[:, 1:3].sort(dim=1).values
    cells_in_first_box = bands[:, :, :3].flatten(1).sort(dim=1).values
    assert len(cells_in_first_box.unique(dim=0)) == 1  # every first box holds 1..9
    rows_mixed = [{tuple(sorted(row[:3].tolist())) for row in grid[1:3]} for grid in canonical.reshape(60, 9, 9)]
    assert len({frozenset(rows) for rows in rows_mixed}) > 5


@pytest.mark.parametrize("side", [4, 9])
def test_reports_equal_a_count_by_hand(side, generator):
    grids = torch.cat([random_grids(5, side, generator), torch.randint(0, 11, (40, side, side), generator=generator)])
    grids[5, 0, :2] = grids[5, 0, 2]
    report = check_grids(grids)
    for b, grid in enumerate(grids.tolist()):
        violations, cells = check_by_hand(grid)
        assert report.violations[b] == violations
        assert report.valid[b] == (violations == 0)
        assert {tuple(cell) for cell in report.violating_cells[b].nonzero().tolist()} == cells


def test_random_grids_of_side_9_have_85_violations():
    grids = torch.randint(1, 10, (2000, 9, 9), generator=torch.Generator().manual_seed(0))
    assert check_grids(grids).violations.double().mean().item() == pytest.approx(27 * 9 * (8 / 9) ** 9, abs=0.7)


def test_boards_are_drawn_cell_by_cell_and_read_back(judge, generator):
    train, grids = load_digits("train"), random_grids(50, 4, generator)
    boards = draw_boards(grids, train, generator)
    assert boards.shape == (50, 1, 32, 32)
    assert torch.equal(read_boards(boards, judge.reader, 4), grids)
    assert judge(boards).valid.all()
    cell = board_grid(4, 8).to_patches(boards)[7, 6].reshape(8, 8)
    assert torch.equal(cell, boards[7, 0, 8:16, 16:24])
    assert 0.98 < judge.reader_accuracy < 1


def test_clues_are_of_the_asked_number_at_random_places(generator):
    clues = random_clues(4000, 9, 0, 26, generator)
    number = clues.sum(1)
    assert number.min() == 0
    assert number.max() == 26
    assert number.double().mean().item() == pytest.approx(13, abs=5 * 7.8 / 4000**0.5)
    assert (clues.double().mean(0) - 13 / 81).abs().max() < 5 * (0.16 * 0.84 / 4000) ** 0.5
    assert (random_clues(10, 4, 3, 3, generator).sum(1) == 3).all()


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (4, 3), (0, 17)])
def test_impossible_clue_numbers_are_refused(low, high, generator):
    with pytest.raises(ValueError, match="clues must satisfy"):
        random_clues(3, 4, low, high, generator)


def test_clue_cells_that_change_by_a_bit_are_seen(generator):
    boards = draw_boards(random_grids(3, 4, generator), load_digits("test"), generator)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, 5] = True
    changed = boards.clone()
    changed[1, 0, 8, 8] += 1e-6  # in cell 5
    changed[2, 0, 0, 0] += 1  # in cell 0
    assert clues_kept(changed, known, boards, 4).tolist() == [True, False, True]
    assert clues_kept(changed, known.reshape(3, 4, 4), boards, 4).tolist() == [True, False, True]


@pytest.mark.parametrize("side", [4, 9])
def test_the_task_draws_valid_boards_of_its_models_shape(side, generator):
    task = DigitSudoku(side)
    boards = task.sample(6, generator)
    assert boards.shape == (6, 1, task.config.image_size, task.config.image_size)
    assert task.judge()(boards).valid.all()


@pytest.mark.parametrize("side", [3, 16, "4", None])
def test_other_sides_are_refused(side):
    with pytest.raises(ValueError, match="side must be one of"):
        board_grid(side, 8)
