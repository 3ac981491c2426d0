"""Samples in which a model makes NaN: written, told in one line, and the command fails."""

import sys
import warnings

import numpy as np
import pytest

from ipr_fast.cli.main import main

MODULE = '''
import torch
import ipr_fast


class Model:
    """Predicts NaN for every second row, once `begins` calls are over."""

    grid = ipr_fast.PatchGrid(1, SIDE, SIDE, SIDE // 4)
    begins = 0

    def __call__(self, patches, levels, active=None):
        self.begins -= 1
        slots = patches if active is None else active.gather(patches)
        bad = torch.arange(len(patches)) % 2 == 0 if self.begins < 0 else torch.zeros(len(patches), dtype=torch.bool)
        return ipr_fast.Prediction(torch.where(bad[:, None, None], torch.nan, slots * 0.5))
'''


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Run a command with that model, which must fail, and return the one line that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nan_model", raising=False)

    def run(*arguments, side=16):
        (tmp_path / "nan_model.py").write_text(MODULE.replace("SIDE", str(side)))
        assert main([*map(str, arguments), "--model", "nan_model:Model", "--quiet"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    yield run
    sys.modules.pop("nan_model", None)


@pytest.fixture
def samples(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 16, 16)).astype(np.float32))
    return tmp_path / "x.npy"


@pytest.mark.parametrize("chunk", [2, 4])
@pytest.mark.parametrize("command", ["generate", "refine"])
def test_arrays_hold_all_samples(tmp_path, fails, samples, command, chunk):
    options = ["--count", 4] if command == "generate" else [samples, "--iters", 1, "--chunk", chunk]
    told = f"ipr-fast {command}: error: 2 of 4 samples have NaN or inf, from the model's predictions (number 0, 2); "
    assert fails(command, *options, "--out", "y.npy") == f"{told}all are in y.npy\n"
    assert np.isfinite(np.load("y.npy")).all((1, 2, 3)).tolist() == [False, True, False, True]
    assert not (tmp_path / "y.npy.partial").exists()


def test_pictures_leave_them_out_even_if_there_were_earlier_ones(tmp_path, fails):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "pictures" / "0002.png")
    assert fails("generate", "--count", 4, "--out", "pictures").endswith("(number 0, 2); the others are in pictures\n")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0001.png", "0003.png"]


def test_many_are_not_listed(fails):
    told = fails("generate", "--count", 20, "--out", "x.pt")
    assert "10 of 20 samples" in told
    assert "(number 0, 2, 4, 6, 8, ...)" in told


@pytest.mark.usefixtures("recwarn")
@pytest.mark.parametrize("filters", ["default", "ignore", "error"])
def test_the_filters_of_warnings_change_nothing(fails, filters):
    warnings.simplefilter(filters)
    assert "2 of 4 samples" in fails("generate", "--count", 4, "--out", "x.pt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--count", 4, "--iters", 2, "--out", "demo"],
        ["evaluate", "--count", 4, "--iters", 2, "--arms", "none", "--out", "q.json"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("begins", [0, 60])
def test_nothing_is_measured_on_them(tmp_path, fails, monkeypatch, arguments, begins):
    """Whether the first pass makes them, of 48 calls, or an iteration."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys.modules[__name__], "MODULE", MODULE.replace("begins = 0", f"begins = {begins}"))
    assert "error: 2 of 4 samples have NaN or inf, from the model's predictions" in fails(*arguments, side=32)
    assert not (tmp_path / "q.json").exists()
    assert not (tmp_path / "demo" / "results.json").exists()
