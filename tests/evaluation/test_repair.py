"""Repair of boards with swapped pairs of cells."""

import pytest
import torch

import ipr_fast
from ipr_fast.evaluation import arms
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.repair import measure_repair
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku, read_boards

pytest.importorskip("sklearn")
COUNT = 24


class Oracle:
    """Draws the intact boards' own cells, whatever it sees."""

    grid = DigitSudoku(4).grid
    generate_schedule = refine_schedule = ipr_fast.Schedule(1, 0.0)

    def __init__(self, boards):
        self.clean = self.grid.to_patches(boards)

    def __call__(self, patches, levels, active=None):
        clean = self.clean[: len(patches)]
        if active is not None:
            patches, clean = active.gather(patches), active.gather(clean)
        return ipr_fast.Prediction((patches - clean) / levels.clamp_min(1e-6)[..., None])


@pytest.fixture
def boards():
    return draw_clues(DigitSudoku(4), COUNT, (16, 16), 5)[1]


def test_an_oracle_restores_every_board_in_time(boards):
    results = measure_repair(DigitSudoku(4), Oracle(boards), "oracle", COUNT, 30, (0, 2), seed=5)
    intact, corrupted = results["repair"]
    assert (intact["pairs"], corrupted["pairs"]) == (0, 2)
    assert intact["valid_by_iteration"] == [intact["valid_by_iteration"][0]] * 31
    assert len(corrupted["valid_by_iteration"]) == len(corrupted["violations_by_iteration"]) == 31
    assert corrupted["valid_by_iteration"][0] < intact["valid_by_iteration"][0]
    assert corrupted["valid_by_iteration"][-1] == intact["valid_by_iteration"][-1]
    assert corrupted["violations_by_iteration"][0] > corrupted["violations_by_iteration"][-1]
    assert corrupted["as_before"][0] == 1
    assert corrupted["valid"][0] == corrupted["valid_by_iteration"][-1] / COUNT


def test_the_boards_are_held_out_ones_and_differ_by_k_swaps_only(boards, monkeypatch):
    seen = []
    monkeypatch.setattr(arms, "refine_batch", lambda x, *_, **__: seen.append(x) or x)
    results = measure_repair(DigitSudoku(4), Oracle(boards), "oracle", COUNT, 1, (0, 3), seed=5)
    torch.testing.assert_close(seen[0], boards, rtol=0, atol=0)
    before, after = (Oracle.grid.to_patches(x) for x in seen)
    assert ((before != after).any(-1).sum(1) == 6).all()
    reader = DigitSudoku(4).judge().reader
    same = (read_boards(seen[1], reader, 4) == read_boards(boards, reader, 4)).flatten(1).all(1)
    assert results["repair"][1]["as_before"][0] == same.double().mean().item()


def test_only_boards_can_be_repaired_and_of_no_more_pairs_than_fit(boards):
    with pytest.raises(ValueError, match="repair is measured on boards of digits, got a model of even-pixels"):
        measure_repair(EvenPixels(), Oracle(boards), "oracle", 2)
    with pytest.raises(ValueError, match=r"pairs must be in 0..8, half the cells of a board, got \(9,\)"):
        measure_repair(DigitSudoku(4), Oracle(boards), "oracle", 2, pairs=(9,))
