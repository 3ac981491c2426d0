"""bench/kernels.py as far as it goes without a GPU."""

import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs where there is a GPU")
def test_it_says_what_it_needs(monkeypatch, capsys):
    import kernels

    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "needs a CUDA device" in capsys.readouterr().err


def test_its_checks_and_its_table():
    """With the twins in the kernels' place and no times: each operation is compared, and has a row."""
    import kernels

    table = kernels.report(kernels.measure(2, torch.device("cpu")))
    assert table.count("\n") == 1 + 3 * len(kernels.SHAPES) + 2 + 3
    for name in ("renoise", "advance", "denoise", "layer norm", "group norm", "partial attention"):
        assert name in table
