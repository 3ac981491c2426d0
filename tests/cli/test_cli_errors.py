"""A user's errors, interrupts and closed outputs: how a command ends."""

import sys

import numpy as np
import pytest
import torch
from command_line import failed_in_one_line

from ipr_fast.cli.main import main
from ipr_fast.errors import BrokenExtra

FAILURES = [
    (["refine", "absent.npy", "--out", "b.npy"], "absent.npy: no such file or folder"),
    (["generate", "--known", "absent.npy", "--out", "b.npy"], "absent.npy: no such file"),
    (["refine", "gray.npy", "--out", "b.jpg"], "b.jpg: must end in one of"),
    (
        ["refine", "rgb.npy", "--out", "b.npy"],
        "--model must be given: none is bundled for samples of shape (3, 8, 8)",
    ),
    (["refine", "nan.npy", "--out", "b.npy"], "the input must be finite"),
    (["refine", "gray.npy", "--out", "b.npy", "--ratio", "0"], "ratio must be a number in (0, 1]"),
    (["refine", "gray.npy", "--out", "b.npy", "--schedule", "2.5", "0"], "--schedule: "),
    (["refine", "gray.npy", "--out", "b.npy", "--known", "gray.npy"], "known must have shape"),
    (
        ["generate", "--out", "b.npy", "--model", "nothing"],
        "error: --model must be a bundled model (counting-polygons-small, ",
    ),
    (["refine", "gray.npy", "--out", "b.npy", "--model", "x" * 5000], "error: --model 'xxx"),
    (["refine", "gray.npy", "--out", "b.npy", "--model", ""], "error: --model must be a bundled model ("),
    (["demo", "--out", "d", "--model", "absent.safetensors"], "error: --model must be a bundled model ("),
    (["generate", "--out", "b.npy", "--seed", "-1"], "--seed must be an int in 0.."),
    (["generate", "--out", "b.npy", "--device", "gpu"], "--device 'gpu' cannot be used"),
    (["generate", "--out", "b.npy", "--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
    (["generate", "--out", "b.npy", "--device", "meta"], "--device 'meta' cannot be used"),
    (["generate", "--out", "b.npy", "--stochasticity", "2"], "stochasticity must be a finite number in [0, 1]"),
    (["demo", "--clues", "5", "2", "--out", "d"], "clues must satisfy"),
    (["demo", "--ratio", "2", "--out", "d"], "ratio must be a number"),
    (["demo", "--out", "gray.npy"], "--out: gray.npy is not a folder"),
    (["generate", "--out", "gray.npy/b.npy"], "gray.npy is a file, not a folder"),
    (["train", "--out", "t", "--learning-rate", "-1"], "learning_rate must be a finite number"),
    (["train", "--out", "t", "--learning-rate", "inf"], "learning_rate must be a finite number"),
    (["train", "--out", "t", "--mnist", "absent"], "no MNIST file"),
    (
        ["train", "--out", "t", "--mnist", "absent", "--task", "even-pixels"],
        "mnist: even-pixels has no digit images",
    ),
    (["train", "--out", "t", "--minutes", "0"], "minutes must be positive"),
    (["train", "--out", "t", "--minutes", "nan"], "minutes must be a finite number"),
    (["train", "--out", "t", "--width", "50"], "num_heads must divide width"),
    (["train", "--out", "gray.npy"], "gray.npy: cannot be made a folder"),
    (["train", "--out", "places"], "places/model.safetensors: is a folder, in the place of a file"),
    (["refine", "gray.npy", "--out", "places"], "places/0000.png: is a folder, in the place of a file"),
    (["demo", "--out", "places"], "places/results.json: is a folder, in the place of a file"),
    (["generate", "--out", "b.npy", "--first-chain", str(2**32 - 63)], "--first-chain must be an int in 0..4294967232"),
    (
        ["refine", "gray.npy", "--out", "b.npy", "--first-chain", str(2**32)],
        "--first-chain must be an int in 0..42949",
    ),
    (
        ["refine", "gray.npy", "--out", "./gray.npy"],
        "--out must differ from the input",
    ),
    (["refine", "sparse.pt", "--out", "b.npy"], "sparse.pt: must hold a dense tensor with data, got torch.sparse_coo"),
    (["generate", "--out", "b.npy", "--count", str(2**33)], "the number of samples must be an int in 0..4294967296"),
    (["convert", "absent.ckpt", "b.safetensors"], "error: source must be a bundled model"),
    (
        ["convert", "digit-sudoku-4x4", "places/model.safetensors"],
        "places/model.safetensors: is a folder, in the place of a file",
    ),
    (["info", "absent.safetensors"], "error: model must be a bundled model"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_user_errors_end_in_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.save("rgb.npy", np.zeros((1, 3, 8, 8), dtype=np.float32))
    np.save("gray.npy", np.zeros((1, 1, 32, 32), dtype=np.float32))
    np.save("nan.npy", np.full((1, 1, 32, 32), np.nan, dtype=np.float32))
    torch.save(torch.zeros(1, 1, 32, 32).to_sparse(), "sparse.pt")
    for name in ("model.safetensors", "0000.png", "results.json"):
        (tmp_path / "places" / name).mkdir(parents=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([*arguments, *([] if arguments[0] in ("info", "convert") else ["--quiet"])]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ipr-fast {arguments[0]}: error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing was begun


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_output_is_no_obstacle(tmp_path, weights, monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)
    assert main(["generate", "--count", "2", "--model", weights, "--out", str(tmp_path / "a.npy")]) == 0
    assert np.load(tmp_path / "a.npy").shape == (2, 1, 16, 16)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--boards", "0"], ["refine"], ["demo", "--iters", "x"]])
def test_wrong_usage_ends_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    if arguments:
        program = "ipr-fast" if arguments == ["dance"] else f"ipr-fast {arguments[0]}"
        assert captured.err.startswith(f"{program}: error: ")
        assert captured.err.endswith(f" See {program} --help\n")
        assert captured.err.count("\n") == 1
    else:
        assert "Usage: ipr-fast" in captured.out


@pytest.mark.parametrize(
    "arguments", [["generate"], ["refine", "x.npy"], ["demo"], ["train"], ["convert", "x.ckpt"]], ids=lambda a: a[0]
)
def test_an_empty_path_is_wrong_usage(tmp_path, monkeypatch, arguments, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*arguments, *([""] if arguments[0] == "convert" else ["--out", ""])])
    assert end.value.code == 2
    assert "must be a path, got ''" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_with_exit_code_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ipr_fast.cli.demo.run_demo", interrupted)
    assert main(["demo", "--quiet"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(monkeypatch, capsys):
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr("ipr_fast.cli.info.bundled_models", gone)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main replaces it
    assert main(["info"]) == 1
    assert "error" not in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image", raising=False)
    assert main(["generate", "--count", "1", "--out", "somewhere", "--quiet", "--schedule", "1", "1"]) == 1
    assert failed_in_one_line(capsys, "generate", "pip install 'ipr-fast[plots]'")


def test_a_broken_extra_says_why(monkeypatch, capsys):
    def broken(*_):
        raise BrokenExtra("pillow", "PNG files", ImportError("libz.so.1: no such file"))

    monkeypatch.setattr("ipr_fast.pictures.import_extra", broken)
    assert main(["generate", "--count", "1", "--out", "somewhere", "--quiet"]) == 1
    assert failed_in_one_line(capsys, "generate", "pillow, which is installed but broken (ImportError: libz.so.1: no")
