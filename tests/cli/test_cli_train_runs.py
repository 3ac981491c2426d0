"""ipr-fast train: its end, Ctrl-C, resume, and a disk that is full."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import ipr_fast
from ipr_fast.cli.main import main
from ipr_fast.tasks.even_pixels import EvenPixels


def test_train_ends_after_its_minutes_and_evaluates(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--task", "even-pixels", "--width", "16", "--depth", "1", "--num-heads", "1", "--batch-size", "2"]
    options += ["--minutes", "0.03", "--evaluate", "2", "--iters", "1", "--dtype", "bfloat16"]
    assert main(["train", "--out", str(out), *options]) == 0
    captured = capsys.readouterr()
    for words in ("wrote", "of 2 balanced", "saturation deviation", "evaluation.json"):
        assert words in captured.out
    assert "samples/s" in captured.err
    assert "of peak" in captured.err
    assert json.loads((out / "evaluation.json").read_text())["images"] == 2
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert 1.8 <= last["seconds"] < 20
    assert last["samples_per_second"] > 0
    assert 0 < last["share_of_peak"] < 2
    model = ipr_fast.load_model(out / "model.safetensors")
    assert model.config.width == 16
    assert model.grid.sample_shape == (3, 32, 32)
    assert main(["info", str(out / "model.safetensors")]) == 0
    assert "even-pixels" in capsys.readouterr().out


QUICK_TRAINING = ["train", "--batch-size", "2", "--width", "16", "--depth", "1", "--num-heads", "1", "--quiet"]


def test_an_interrupted_training_is_saved_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    options = [*QUICK_TRAINING, "--task", "even-pixels", "--steps", "4", "--evaluate", "0"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    steps, sample = [], EvenPixels.sample

    def interrupted(task, batch_size, generator):
        steps.append(batch_size)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return sample(task, batch_size, generator)

    run = [*options, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(EvenPixels, "sample", interrupted)
        assert main(run) == 130
    assert "ipr-fast train: interrupted (--resume goes on" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--evaluate", "0", "--quiet"]) == 0
    whole, resumed = (ipr_fast.load_model(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_a_resumed_training_ends_where_the_run_does_or_later(tmp_path, capsys):
    options = [*QUICK_TRAINING, "--task", "even-pixels", "--evaluate", "0", "--out", str(tmp_path)]

    def steps_after(*more):
        assert main([*options, *more]) == 0
        return torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]

    assert steps_after("--steps", "2") == 2
    assert steps_after("--resume") == 2
    assert steps_after("--resume", "--steps", "3") == 3
    assert steps_after("--resume") == 3
    assert steps_after("--resume", "--minutes", "0.02") > 3
    assert main([*options, "--resume", "--steps", "1"]) == 1
    assert "must end after that, got steps 1 and minutes None" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert main([*options, "--resume"]) == 1
    assert "not a readable checkpoint" in capsys.readouterr().err


def run_with_files_of_at_most(size, arguments):
    """The command line in a process of its own, on a disk that seems full beyond so many bytes a file."""
    pytest.importorskip("resource")
    code = f"import resource, sys; from ipr_fast.cli.main import main; size = {size}; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("size", "name"), [(20_000, "checkpoint.pt"), (150, "log.jsonl")])
def test_a_full_disk_ends_training_in_one_line_and_leaves_the_checkpoint(tmp_path, size, name):
    options = [*QUICK_TRAINING, "--task", "even-pixels", "--evaluate", "0", "--out", str(tmp_path)]
    assert main([*options, "--steps", "1"]) == 0
    (tmp_path / "log.jsonl").write_text("")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ended = run_with_files_of_at_most(size, [*options, "--resume", "--steps", "3"])
    assert ended.returncode == 1
    assert ended.stderr == f"ipr-fast train: error: [Errno 27] File too large: '{tmp_path / name}'\n"
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    for whole in ("checkpoint.pt", "model.safetensors"):
        assert (tmp_path / whole).read_bytes() == before[whole]
    assert main([*options, "--resume", "--steps", "3"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3]


def test_an_evaluation_that_cannot_be_written_leaves_no_half_of_it(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def evaluate(*args, **kwargs):
        monkeypatch.setattr("ipr_fast.outputs.os.fsync", full)
        return {}

    monkeypatch.setattr("ipr_fast.cli.train.evaluate", evaluate)
    monkeypatch.setattr("ipr_fast.cli.train.describe", lambda *args: [])
    assert main([*QUICK_TRAINING, "--task", "even-pixels", "--steps", "1", "--out", str(tmp_path)]) == 1
    assert f"No space left on device: '{tmp_path / 'evaluation.json'}'" in capsys.readouterr().err
    assert not list(tmp_path.glob("evaluation.json*"))


def test_a_run_that_diverges_says_so(tmp_path, capsys):
    options = ["--learning-rate", "1e12", "--steps", "50", "--batch-size", "2", "--warmup", "0", "--quiet"]
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 1
    assert "the loss is not finite" in capsys.readouterr().err
