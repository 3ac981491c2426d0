"""srmbench's evaluators on our samples and runs: they agree with our judges sample by sample."""

import importlib.util
import struct

import numpy as np
import pytest
import torch
from small_plans import run_file, write_plan
from torch.nn import functional as F

from ipr_fast.errors import MissingExtra
from ipr_fast.evaluation.scale import benchmark
from ipr_fast.evaluation.scale.benchmark import agreement, evaluator, main
from ipr_fast.sampling.corrupt import swap_patches
from ipr_fast.tasks.digits import DigitReader, load_digits
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku

ABSENT = importlib.util.find_spec("srmbench") is None or importlib.util.find_spec("jaxtyping") is None
needs_srmbench = pytest.mark.skipif(ABSENT, reason="srmbench or jaxtyping is not installed")


@pytest.fixture
def mnist(tmp_path):
    """A folder of MNIST's files, with scikit-learn's digits enlarged to 28x28."""
    for stem, split in (("train", "train"), ("t10k", "test")):
        digits = load_digits(split)
        images = F.interpolate(digits.images[:, None], size=(28, 28), mode="bilinear")[:, 0]
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
        header = struct.pack(">4I", 0x0803, len(pixels), 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = struct.pack(">2I", 0x0801, len(pixels)) + digits.labels.numpy().astype(np.uint8).tobytes()
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return str(tmp_path)


@needs_srmbench
def test_verdicts_on_even_pixels_agree(generator):
    images = EvenPixels().sample(40, generator)
    images[20:, :, :2] = images[20:, :, 2:4]  # most of these are uneven
    images[30:] += 0.05 * torch.randn(10, 3, 32, 32, generator=generator)
    ours = EvenPixels().judge()(images).good
    assert torch.equal(evaluator("even-pixels")(images), ours)
    assert 20 <= ours.sum() < 40


class OurReader(torch.nn.Module):
    """Reads 28x28 tiles (M, 1, 28, 28) as our judge does, in place of srmbench's downloaded classifier."""

    def __init__(self, reader: DigitReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, tiles):
        return F.one_hot(self.reader.read(tiles[:, 0]), 10).float()


@needs_srmbench
def test_verdicts_and_violations_of_boards_agree(mnist, generator, monkeypatch):
    """Both judge by one reader, as srmbench's classifier is a download: what is compared is the cells and the rules.

    srmbench counts missing and surplus digits, we the missing ones; they are equally many. It never reads a 0.
    """
    task = DigitSudoku(9, mnist)
    judge = task.judge()
    module = benchmark._module("mnist_sudoku")
    monkeypatch.setattr(module.MNISTClassifier, "from_pretrained", lambda name: OurReader(judge.reader))
    boards = task.sample(24, generator)
    boards = torch.cat([boards, *(swap_patches(boards, pairs, 28, seed=pairs) for pairs in (1, 3, 9))])
    read = judge.read(boards)
    boards = boards[(read > 0).flatten(1).all(1)]
    assert len(boards) > 80
    report = judge(boards)
    assert torch.equal(evaluator("digit-sudoku-9x9")(boards), report.valid)
    theirs = module.MnistSudokuEvaluation().evaluate(boards)
    assert torch.equal(theirs["is_valid_sudoku"], report.valid)
    assert torch.equal(theirs["duplicate_count"], 2 * report.violations)
    assert 0 < report.valid.sum() < len(boards) / 2


@needs_srmbench
def test_a_runs_stored_verdicts_agree(tmp_path, capsys):
    run = run_file(write_plan(tmp_path), tmp_path / "run")
    found = agreement(run, evaluator("even-pixels"))
    assert {name: counts["samples"] for name, counts in found.items()} == {
        "one pass": 10,
        "refined": 20,
        "best of 2": 20,
    }
    assert all(counts["ours"] == counts["theirs"] == 0 for counts in found.values())
    assert main(str(tmp_path / "run")) == found
    assert "one pass: 10 of 10 verdicts agree; good: " in capsys.readouterr().out


def test_disagreement_is_counted(tmp_path):
    run = run_file(write_plan(tmp_path), tmp_path / "run")
    judge = EvenPixels().judge()
    found = agreement(run, lambda samples: ~judge(samples).good)
    for counts in found.values():
        assert counts["ours"] + counts["theirs"] == counts["samples"]
        assert counts["both"] == 0


@pytest.mark.parametrize("task", ["token-sudoku-9x9", "digit-sudoku-4x4", "chess"])
def test_tasks_that_it_does_not_have_are_refused(task):
    with pytest.raises(ValueError, match=f"srmbench judges even-pixels, .* got {task}"):
        evaluator(task)


def test_its_absence_is_said(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    benchmark._module.cache_clear()
    with pytest.raises(MissingExtra, match=r"ipr-fast\[srmbench\]"):
        evaluator("even-pixels")
