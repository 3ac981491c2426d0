"""Rewards of boards: those of the judges, for tokens and images."""

import pytest
import torch

from ipr_fast.tasks import grids
from ipr_fast.tasks.catalog import make_task
from ipr_fast.tasks.rewards import minus_violations, valid_board


@pytest.mark.parametrize("name", ["token-sudoku-4x4", "token-sudoku-9x9", "digit-sudoku-4x4", "digit-sudoku-9x9"])
def test_they_are_the_judges_numbers(name, monkeypatch, generator):
    monkeypatch.setattr(grids, "BASE_GRIDS", 50)
    task = make_task(name)
    x = task.sample(12, generator)
    x[6:] = x[6:].flip(-1).roll(1, -1)  # moves columns between boxes
    report = task.judge()(x)
    assert 0 < int(report.valid.sum()) < 12
    for reward, expected in ((valid_board, report.valid), (minus_violations, -report.violations)):
        assert reward(x).dtype == torch.float64
        assert reward(x).tolist() == expected.tolist()
        assert reward(x[:0]).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 25), (2, 3, 32, 32), (2, 1, 252, 252), (2, 16)])
def test_other_samples_are_refused(shape):
    for reward in (valid_board, minus_violations):
        with pytest.raises(ValueError, match=r"this reward is of Sudoku boards, .*, got \(2, .* of torch.float32"):
            reward(torch.zeros(shape))


@pytest.mark.parametrize("x", [[1], None])
def test_what_is_no_tensor_is_refused(x):
    for reward in (valid_board, minus_violations):
        with pytest.raises(ValueError, match=f"this reward is of Sudoku boards, .*, got {type(x).__name__}; "):
            reward(x)
