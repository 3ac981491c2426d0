"""The comparison of initialisations, and its probe."""

import pytest
import torch

import ipr_fast
from ipr_fast.evaluation import initialisation
from ipr_fast.evaluation.initialisation import FillIn, compare_initialisations
from ipr_fast.evaluation.report import report
from ipr_fast.tasks.sudoku import DigitSudoku

pytest.importorskip("sklearn")


def test_the_probe_tells_who_knows_the_boards_from_who_does_not():
    task = DigitSudoku(9)
    probe = FillIn(task)

    class Oracle:
        def predict(self, noisy, levels, is_active):
            assert (is_active.sum(1) == 20).all()
            assert torch.equal(levels, is_active.float())
            return ipr_fast.Prediction(noisy - probe.patches, None, None)

    class Blank:
        def predict(self, noisy, levels, is_active):
            return ipr_fast.Prediction(noisy + 1, None, None)

    assert probe.accuracy(Oracle(), 20) > 0.98  # the reader misreads one digit in two hundred
    assert probe.accuracy(Blank(), 20) < 0.2
    assert torch.equal(probe.noise[0], FillIn(task).noise[0])


def test_both_arms_are_trained_and_probed(monkeypatch):
    monkeypatch.setattr(initialisation, "SIZES", {"width": 32, "depth": 1, "num_heads": 1})
    said = []
    results = compare_initialisations(128, 64, seed=3, say=said.append)
    assert list(results["arms"]) == ["line-biased heads", "random heads"]
    assert [[row[0] for row in rows] for rows in results["arms"].values()] == [[64, 128]] * 2
    assert len(said) == 4
    assert "| 128 | " in report(results)
    assert "one run each, seed 3." in report(results)
