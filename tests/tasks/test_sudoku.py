import pytest
import torch

from ipr_fast.tasks import grids
from ipr_fast.tasks.digits import DigitReader, load_digits
from ipr_fast.tasks.grids import random_grids
from ipr_fast.tasks.sudoku import (
    BoardJudge,
    BoardReport,
    DigitSudoku,
    assemble,
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


@pytest.fixture(scope="module")
def large():
    """The task of side 9 with 200 base grids; searching for 4,096 takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "BASE_GRIDS", 200)
        task = DigitSudoku(9)
        task.sample(1, torch.Generator())
        yield task


def check_by_hand(grid):
    """Compute (violations, violating cells) of a grid by sets and loops."""
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


def test_the_smallest_change_of_a_clue_cell_is_found(generator):
    boards = draw_boards(random_grids(3, 4, generator), load_digits("test"), generator)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, 5] = True
    changed = boards.clone()
    changed[1, 0, 8, 8] += 1e-6  # in cell 5
    changed[2, 0, 0, 0] += 1  # in cell 0
    assert clues_kept(changed, known, boards, 4).tolist() == [True, False, True]
    assert clues_kept(changed, known.reshape(3, 4, 4), boards, 4).tolist() == [True, False, True]


def test_cells_are_put_side_by_side(generator):
    cells = torch.randn(3, 4, 4, 5, 5, generator=generator)
    boards = assemble(cells)
    assert boards.shape == (3, 1, 20, 20)
    for row in range(4):
        for column in range(4):
            assert torch.equal(boards[:, 0, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5], cells[:, row, column])
    assert torch.equal(board_grid(4, 5).to_patches(boards), cells.reshape(3, 16, 25))
    assert assemble(cells[:0]).shape == (0, 1, 20, 20)


@pytest.mark.parametrize("side", [4, 9])
def test_the_task_draws_valid_boards_of_its_grid(side, large, generator):
    task = DigitSudoku(4) if side == 4 else large
    boards = task.sample(60, generator)
    assert boards.shape == (60, *task.grid.sample_shape)
    assert boards.dtype == torch.float32
    assert boards.min() == -1
    assert boards.max() <= 1
    assert task.judge()(boards).good.all()


@pytest.mark.parametrize("side", [4, 9])
def test_the_tasks_boards_follow_the_generator(side, large):
    task = DigitSudoku(4) if side == 4 else large
    draw = [task.sample(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert len(draw[0].flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("side", [4, 9])
def test_the_task_draws_no_boards(side, large, generator):
    task = DigitSudoku(4) if side == 4 else large
    assert task.sample(0, generator).shape == (0, 1, 8 * side, 8 * side)


def test_large_boards_come_from_more_grids_than_were_found(large, generator):
    """The 200 base grids have 1.2e12 symmetries each."""
    drawn = read_boards(large.sample(400, generator), large.judge().reader, 9)
    assert len(drawn.flatten(1).unique(dim=0)) == 400


def test_two_tasks_of_side_9_draw_the_same_boards(large, monkeypatch):
    monkeypatch.setattr(grids, "BASE_GRIDS", 200)
    draw = [task.sample(2, torch.Generator().manual_seed(0)) for task in (large, DigitSudoku(9))]
    assert torch.equal(*draw)


def test_digits_on_large_boards_are_jittered_and_on_small_ones_are_not(large, generator):
    known = load_digits("train").images.flatten(1)
    for task, distance in ((DigitSudoku(4), torch.eq), (large, torch.ne)):
        cells = board_grid(task.side, 8).to_patches(task.sample(3, generator)).flatten(0, 1)
        assert distance((cells[:, None] == known).all(2).any(1), True).all()


def test_a_reports_good_and_measures():
    report = BoardReport(torch.tensor([True, False]), torch.tensor([0, 3]), torch.zeros(2, 4, 4, dtype=torch.bool))
    assert report.good is report.valid
    assert list(report.measures()) == ["violations"]
    assert report.measures()["violations"] is report.violations


def test_the_judges_note_says_how_well_it_reads(judge):
    judged_by = BoardJudge(4, judge.reader, 0.99555)
    assert judged_by.note == "judged by a reader that reads 99.6 % of held-out digits right"
    assert f"{100 * judge.reader_accuracy:.1f} %" in judge.note


@pytest.mark.parametrize("side", [3, 16, "4", None])
def test_other_sides_are_refused(side):
    with pytest.raises(ValueError, match="side must be one of"):
        board_grid(side, 8)


@pytest.mark.parametrize("side", [4, 9])
def test_symbols_are_the_digits_of_the_cells(side):
    task = DigitSudoku(side)
    boards, symbols = task.sample_with_symbols(8, torch.Generator().manual_seed(5))
    assert torch.equal(boards, task.sample(8, torch.Generator().manual_seed(5)))
    assert symbols.min() == 0
    assert symbols.max() == task.num_symbols - 1
    read = read_boards(boards, DigitReader(task.train), side).flatten(1) - 1
    assert (read == symbols).float().mean() > 0.99
    assert torch.equal(task.read_symbols(boards), read)
