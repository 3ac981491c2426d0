"""Coverage of the 288 grids of side 4."""

import pytest
import torch

from ipr_fast.evaluation.diversity import coverage, measure_diversity
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.grids import all_grids
from ipr_fast.tasks.sudoku import BoardJudge, DigitSudoku, draw_boards

pytest.importorskip("sklearn")


class PerfectReader:
    """Reads cells whose pixels all hold the digit."""

    def read(self, cells):
        return cells[..., 0, 0].long()


def test_every_grid_once_is_even_and_one_grid_again_and_again_is_not():
    judge = BoardJudge(4, PerfectReader(), 1.0)
    cells = all_grids(4)[..., None, None].expand(-1, -1, -1, 8, 8).float()
    boards = cells.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[:, None]
    even = coverage(boards, judge)
    assert (even["valid"], even["distinct"], even["degrees_of_freedom"]) == (288, 288, 287)
    assert even["chi_square"] == 0
    one = coverage(boards[:1].expand(288, -1, -1, -1), judge)
    assert (one["valid"], one["distinct"]) == (288, 1)
    assert one["chi_square"] == pytest.approx(288 * 287)
    boards[0] = boards[0, :, :8, :8].repeat(1, 4, 4)  # one digit everywhere
    assert coverage(boards, judge)["valid"] == 287
    none = coverage(boards[:1], judge)
    assert (none["valid"], none["distinct_if_uniform"], none["chi_square"]) == (0, 0, None)


def test_boards_of_true_digits_are_covered():
    generator = torch.Generator().manual_seed(0)
    task = DigitSudoku(4)
    boards = draw_boards(all_grids(4), task.train, generator)
    assert coverage(boards, task.judge())["distinct"] > 280  # but for digits misread


def test_other_tasks_have_no_diversity(model):
    with pytest.raises(ValueError, match="diversity is measured on boards of 4x4 cells, got a model of even-pixels"):
        measure_diversity(EvenPixels(), model, 2)
