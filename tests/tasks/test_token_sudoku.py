"""Sudoku boards of tokens."""

import pytest
import torch

from ipr_fast import Vocabulary
from ipr_fast.tasks import grids
from ipr_fast.tasks.base import TokenTask
from ipr_fast.tasks.catalog import TOKEN_SUDOKU, make_task, task_of_tokens
from ipr_fast.tasks.token_sudoku import TokenSudoku


@pytest.fixture
def task(request, monkeypatch):
    monkeypatch.setattr(grids, "BASE_GRIDS", 200)
    return TokenSudoku(request.param)


@pytest.mark.parametrize("task", [4, 9], indirect=True)
def test_the_task_draws_valid_boards_that_follow_the_generator(task):
    x, again, other = (task.sample(30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert x.shape == (30, task.length) == (30, task.side**2)
    assert x.dtype == torch.int64
    assert (x.min(), x.max()) == (1, task.side)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert task.sample(0, torch.Generator()).shape == (0, task.length)
    assert task.judge()(x).good.all()
    assert isinstance(task, TokenTask)
    assert task.vocabulary == Vocabulary(task.side + 1, 0)


@pytest.mark.parametrize("task", [4, 9], indirect=True)
def test_a_changed_or_an_empty_cell_makes_a_board_invalid(task, generator):
    x, judge = task.sample(3, generator), task.judge()
    x[0, 5] = 0
    x[1, 5] = x[1, 6]
    report = judge(x)
    assert report.valid.tolist() == [False, False, True]
    assert report.violations[0] == 3  # its row, column and box lack a digit each
    assert report.violating_cells[0].flatten().nonzero().flatten().tolist() == [5]
    assert report.violating_cells[1].flatten()[[5, 6]].all()
    assert judge.note == ""


def test_the_task_is_found_by_the_tokens_of_a_model():
    for name, side in TOKEN_SUDOKU.items():
        task = make_task(name)
        assert (task.name, task.side) == (name, side)
        assert task_of_tokens(task.vocabulary, task.length).name == name
    for vocabulary, length in ((Vocabulary(10, 0), 16), (Vocabulary(10, 9), 81), (Vocabulary(10, 0, never=(1,)), 81)):
        with pytest.raises(ValueError, match=r"no task has samples of .* the tasks of tokens are token-sudoku-4x4, "):
            task_of_tokens(vocabulary, length)
    with pytest.raises(ValueError, match="mnist: token-sudoku-9x9 has no digit images"):
        make_task("token-sudoku-9x9", "here")


def test_other_sides_are_refused():
    with pytest.raises(ValueError, match="side must be one of"):
        TokenSudoku(16)
