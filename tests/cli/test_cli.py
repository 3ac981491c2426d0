"""The command line, run in this process: what it writes, what it says, how it ends."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_disk import full_disk

import ipr_fast
from ipr_fast.cli.main import main
from ipr_fast.errors import BrokenExtra
from ipr_fast.files import read_samples
from ipr_fast.tasks.even_pixels import EvenPixels


@pytest.fixture
def weights(tmp_path):
    """A small model of 16x16 samples, as a file."""
    from small_models import TINY, randomise

    path = tmp_path / "tiny.safetensors"
    ipr_fast.save_model(randomise(ipr_fast.models.PatchTransformer(TINY), seed=0), path)
    return str(path)


def test_generate_and_refine_are_the_library_calls(tmp_path, weights, capsys):
    generated, refined = tmp_path / "a.npy", tmp_path / "b.npz"
    assert main(["generate", "--model", weights, "--count", "5", "--seed", "3", "--out", str(generated)]) == 0
    options = ["--iters", "2", "--ratio", "0.5", "--schedule", "4", "0.5", "--seed", "3", "--quiet"]
    assert main(["refine", str(generated), "--model", weights, "--out", str(refined), *options]) == 0
    model = ipr_fast.load_model(weights)
    x = ipr_fast.generate_batch(5, model=model, seed=3)
    assert torch.equal(read_samples(generated).images, x)
    schedule, policy = ipr_fast.Schedule(4, 0.5), ipr_fast.random_patches(0.5)
    assert torch.equal(
        read_samples(refined).images, ipr_fast.refine_batch(x, policy, 2, model=model, schedule=schedule, seed=3)
    )
    captured = capsys.readouterr()
    assert "wrote 5 samples" in captured.out
    assert "generate" in captured.err  # the bar
    assert "refine" not in captured.err  # --quiet


def run(*arguments):
    """Run a command that must end well, without progress bars."""
    assert main([*map(str, arguments), "--quiet"]) == 0


def test_shards_are_the_parts_of_the_whole(tmp_path, weights):
    options = ["--model", weights, "--seed", 3]
    run("generate", "--count", 16, "--out", tmp_path / "all.npy", *options)
    run("refine", tmp_path / "all.npy", "--iters", 2, "--out", tmp_path / "all-refined.npy", *options)
    for first in (0, 8):
        part, refined = tmp_path / f"{first}.npy", tmp_path / f"{first}-refined.npy"
        shard = [*options, "--first-chain", first]
        run("generate", "--count", 8, "--out", part, *shard)
        run("refine", part, "--iters", 2, "--out", refined, *shard)
    for kind in ("", "-refined"):
        shards = torch.cat([read_samples(tmp_path / f"{first}{kind}.npy").images for first in (0, 8)])
        torch.testing.assert_close(shards, read_samples(tmp_path / f"all{kind}.npy").images, atol=1e-5, rtol=0)


def test_known_patches_stay(tmp_path, weights):
    known, values = np.zeros((2, 4, 4), dtype=bool), np.random.default_rng(0).normal(size=(2, 1, 16, 16))
    known[:, 1, 2] = True
    np.save(tmp_path / "known.npy", known)
    np.save(tmp_path / "values.npy", values.astype(np.float32))
    arguments = ["--known", str(tmp_path / "known.npy"), "--model", weights, "--quiet"]
    out, again = tmp_path / "out.pt", tmp_path / "again.pt"
    command = ["generate", "--count", "2", "--known-values", str(tmp_path / "values.npy"), "--out", str(out)]
    assert main([*command, *arguments]) == 0
    assert main(["refine", str(out), "--iters", "2", "--out", str(again), *arguments]) == 0
    for path in (out, again):
        cell = read_samples(path).images[:, :, 4:8, 8:12]
        assert np.array_equal(cell.numpy(), values.astype(np.float32)[:, :, 4:8, 8:12])


def test_folders_of_png(tmp_path, weights):
    pictures, refined = tmp_path / "pictures", tmp_path / "refined"
    assert main(["generate", "--model", weights, "--count", "3", "--out", str(pictures), "--quiet"]) == 0
    assert main(["refine", str(pictures), "--model", weights, "--iters", "1", "--out", str(refined), "--quiet"]) == 0
    assert sorted(p.name for p in refined.iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_refined_pictures_keep_their_16_bits(tmp_path, weights):
    from PIL import Image

    (tmp_path / "deep").mkdir()
    grey = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep" / "x.png")
    np.save(tmp_path / "known.npy", np.arange(16)[None] < 12)
    arguments = ["--known", str(tmp_path / "known.npy"), "--model", weights, "--iters", "1", "--quiet"]
    assert main(["refine", str(tmp_path / "deep"), "--out", str(tmp_path / "refined_0.25"), *arguments]) == 0
    with Image.open(tmp_path / "refined_0.25" / "x.png") as image:
        again = np.array(image)
    assert again.dtype == np.uint16
    assert np.array_equal(again[:12], grey[:12])
    assert not np.array_equal(again[12:], grey[12:])


@pytest.mark.parametrize("clues", [(0, 0), (2, 8)])
def test_the_demo_counts_pictures_and_tells(tmp_path, capsys, clues):
    out = tmp_path / "demo"
    arguments = [
        "--boards",
        "12",
        "--iters",
        "3",
        "--clues",
        str(clues[0]),
        str(clues[1]),
        "--out",
        str(out),
        "--quiet",
    ]
    assert main(["demo", *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    said = capsys.readouterr().out
    assert results["boards"] == 12
    assert results["valid_after"] - results["valid_before"] == results["fixed"] - results["broken"]
    assert results["valid_by_iteration"][0] == results["valid_before"]
    assert len(results["valid_by_iteration"]) == 4
    assert results["valid_after"] >= 6  # the bundled model makes about eight valid boards of ten
    assert results.get("clues_kept", 12) == 12
    for words in ("of 12 valid", " fixed, ", "violations", "held-out digits", "boards.png", "progress.png"):
        assert words in said
    for picture in ("boards.png", "progress.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def even_pixels_weights(tmp_path):
    """A small model of Even Pixels that has learned nothing, as a file."""
    from small_models import randomise

    config = ipr_fast.models.PatchTransformerConfig(
        3, 32, 4, width=16, depth=1, num_heads=1, generate_schedule=(1, 0.9), refine_schedule=(1, 0.9)
    )
    path = tmp_path / "even.safetensors"
    ipr_fast.save_model(randomise(ipr_fast.models.PatchTransformer(config), seed=0), path)
    return str(path)


def test_the_demo_of_another_task(tmp_path, even_pixels_weights, capsys):
    out = tmp_path / "demo"
    options = ["--count", "7", "--iters", "2", "--out", str(out), "--quiet"]
    assert main(["demo", "--model", even_pixels_weights, *options]) == 0
    results = json.loads((out / "results.json").read_text())
    said = capsys.readouterr().out
    assert results["images"] == 7
    assert len(results["mean_imbalance_by_iteration"]) == 3
    assert results["balanced_before"] == results["balanced_by_iteration"][0]
    for words in ("7 images of even-pixels, 32x32 pixels, seed 0", "of 7 balanced", "imbalance", "value deviation"):
        assert words in said
    assert "reader" not in said
    for picture in ("images.png", "progress.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "--model", even_pixels_weights, "--clues", "0", "3", *options]) == 1
    assert "clues: even-pixels has none" in capsys.readouterr().err


def test_the_demo_of_large_boards_has_clues(tmp_path, capsys):
    from small_models import randomise

    config = ipr_fast.models.PatchTransformerConfig(
        1, 72, 8, width=16, depth=1, num_heads=1, box_size=3, generate_schedule=(1, 0.9), refine_schedule=(1, 0.9)
    )
    weights = str(tmp_path / "nine.safetensors")
    ipr_fast.save_model(randomise(ipr_fast.models.PatchTransformer(config), seed=0), weights)
    out = tmp_path / "demo"
    assert main(["demo", "--model", weights, "--iters", "1", "--out", str(out), "--quiet"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["boards"] == results["clues_kept"] == 32
    assert "32 boards of handwritten digits, 9x9 cells, 0 to 26 clues" in capsys.readouterr().out


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


def test_info_tells_versions_and_models(capsys, weights):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "digit-sudoku-4x4  PatchTransformer, samples (1, 32, 32)" in said
    assert main(["info", weights]) == 0
    said = capsys.readouterr().out
    assert "sample_shape  (1, 16, 16)" in said
    assert "dtype         float32" in said


FAILURES = [
    (["refine", "absent.npy", "--out", "b.npy"], "absent.npy: no such file or folder"),
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
        "error: --model must be a bundled model (digit-sudoku-4x4, ",
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


def failed_in_one_line(capsys, command: str, *words: str) -> bool:
    """Whether the command said so in one line that holds these words."""
    error = capsys.readouterr().err
    is_one_line = error.count("\n") == 1 and error.startswith(f"ipr-fast {command}: error: ")
    return is_one_line and all(word in error for word in words)


@pytest.mark.parametrize("out", ["a.npy", "a.npz", "a.pt", "pictures"])
@pytest.mark.parametrize("command", ["generate", "refine"])
def test_a_full_disk_is_told_in_one_line(tmp_path, weights, capsys, command, out):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(-1, 1, (3, 1, 16, 16)).astype(np.float32))
    path = tmp_path / "new" / out
    options = ["--count", "3"] if command == "generate" else [str(tmp_path / "x.npy"), "--iters", "1"]
    with full_disk(50):
        assert main([command, *options, "--model", weights, "--out", str(path), "--quiet"]) == 1
    assert failed_in_one_line(capsys, command, "File too large", str(path))
    assert [p for p in path.parent.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("command", ["generate", "refine"])
def test_a_disk_without_room_ends_a_command_before_its_work(tmp_path, weights, capsys, monkeypatch, command):
    np.save(tmp_path / "x.npy", np.zeros((3, 1, 16, 16), np.float32))
    monkeypatch.setattr(shutil, "disk_usage", lambda of: SimpleNamespace(free=3071))
    monkeypatch.setattr(f"ipr_fast.cli.{'chunks' if command == 'refine' else 'generate'}.{command}_batch", None)
    options = ["--count", "3"] if command == "generate" else [str(tmp_path / "x.npy"), "--iters", "1"]
    assert main([command, *options, "--model", weights, "--out", str(tmp_path / "y.npy"), "--quiet"]) == 1
    assert failed_in_one_line(capsys, command, "y.npy: takes 3,072 bytes, and the disk has room for 3,071")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".npy"] == ["x.npy"]


def test_a_full_disk_under_the_demo_is_told_in_one_line(tmp_path, weights, even_pixels_weights, capsys):
    out = tmp_path / "demo"
    arguments = ["demo", "--model", even_pixels_weights, "--count", "2", "--iters", "1", "--out", str(out), "--quiet"]
    for largest, name, left in (50, "results.json", []), (5000, "images.png", ["results.json"]):
        with full_disk(largest):
            assert main(arguments) == 1
        assert failed_in_one_line(capsys, "demo", "File too large", str(out / name))
        assert [p.name for p in out.iterdir()] == left


def test_a_full_disk_under_an_evaluation_is_told_in_one_line(tmp_path, monkeypatch, weights, capsys):
    monkeypatch.setattr("ipr_fast.cli.train.train", lambda *_, **__: Path(weights))
    monkeypatch.setattr("ipr_fast.cli.train.evaluate", lambda *_, **__: {"share": list(range(100))})
    monkeypatch.setattr("ipr_fast.cli.train.describe", lambda *_: [])
    with full_disk(50):
        assert main(["train", "--out", str(tmp_path), "--quiet"]) == 1
    assert failed_in_one_line(capsys, "train", "File too large", str(tmp_path / "evaluation.json"))
    assert not (tmp_path / "evaluation.json").exists()


def test_a_full_disk_under_convert_is_told_in_one_line(tmp_path, capsys):
    with full_disk(50):
        assert main(["convert", "digit-sudoku-4x4", str(tmp_path / "x.safetensors")]) == 1
    assert failed_in_one_line(capsys, "convert", "File too large", "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_output_into_a_full_disk_is_told_in_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 1
        monkeypatch.undo()
        assert failed_in_one_line(capsys, "info", "No space left on device")
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_a_place_that_cannot_be_written_is_told_in_one_line(weights, capsys):
    for out in ("/proc/none/a.npy", "/proc/none"):
        assert main(["generate", "--count", "1", "--model", weights, "--out", out, "--quiet"]) == 1
        assert failed_in_one_line(capsys, "generate", "/proc/none")


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


def test_the_demo_needs_pictures_before_it_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("ipr_fast.evaluation.demo.follow", lambda *args, **kwargs: 1 / 0)
    assert main(["demo", "--quiet", "--out", str(tmp_path / "demo")]) == 1
    assert "pictures need matplotlib" in capsys.readouterr().err


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

    monkeypatch.setattr("ipr_fast.files.import_extra", broken)
    assert main(["generate", "--count", "1", "--out", "somewhere", "--quiet"]) == 1
    assert failed_in_one_line(capsys, "generate", "pillow, which is installed but broken (ImportError: libz.so.1: no")


def make_checkpoint(path):
    """A small SRM UNet of 16x16 samples in Lightning's format."""
    config = ipr_fast.models.SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)
    model = ipr_fast.models.SRMUNet(config).eval()
    torch.save({"state_dict": {f"ema_denoiser.module.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


SIZES = ["--image-size", "16", "--patch-size", "4", "--num-head-channels", "32"]


def test_a_converted_checkpoint_is_a_model_like_any_other(tmp_path, capsys):
    model, out = make_checkpoint(tmp_path / "x.ckpt"), tmp_path / "new" / "x.safetensors"
    schedules = ["--generate-schedule", "2", "0.5", "--refine-schedule", "3", "0.5"]
    assert main(["convert", str(tmp_path / "x.ckpt"), str(out), *SIZES, *schedules]) == 0
    again = ipr_fast.load_model(out)
    assert again.refine_schedule == ipr_fast.Schedule(3, 0.5)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert main(["info", str(out)]) == 0
    assert "x.ckpt" in capsys.readouterr().out
    samples, refined = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
    assert main(["generate", "--model", str(out), "--count", "2", "--out", samples, "--quiet"]) == 0
    options = ["--iters", "2", "--noise", "fixed", "--fixed-region", "--quiet"]
    assert main(["refine", samples, "--model", str(out), "--out", refined, *options]) == 0
    expected = ipr_fast.refine_batch(
        read_samples(samples).images, ipr_fast.random_patches(fixed=True), 2, model=again, noise="fixed"
    )
    assert torch.equal(read_samples(refined).images, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "cannot infer image_size, patch_size, num_head_channels"),
        (["--preset", "mnist_sudoku"], "has shape (32,), expected (512,)"),
        (
            ["--preset", "mnist_sudoku", *SIZES],
            "--preset already sets image_size, patch_size, num_head_channels",
        ),
        ([*SIZES, "--refine-schedule", "3", "2"], "--refine-schedule: overlap must be a finite number in [0, 1]"),
    ],
)
def test_convert_says_what_it_needs(tmp_path, capsys, options, message):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["convert", str(tmp_path / "x.ckpt"), str(tmp_path / "x.safetensors"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_convert_writes_safetensors_only(tmp_path, capsys):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["convert", str(tmp_path / "x.ckpt"), str(tmp_path / "x.pt"), *SIZES]) == 1
    assert "x.pt: must end in .safetensors" in capsys.readouterr().err


def test_info_of_a_checkpoint_says_what_its_shapes_tell(tmp_path, capsys):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["info", str(tmp_path / "x.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "sample_shape  not in the file" in out
    assert "hid_dims      (32, 32)" in out


def test_what_a_file_says_is_printed_as_one_line(tmp_path, capsys):
    torch.save({"a\nb\x1b[31m": torch.zeros(2)}, tmp_path / "x.ckpt")
    assert main(["info", str(tmp_path / "x.ckpt")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    model = make_checkpoint(tmp_path / "y.ckpt")
    ipr_fast.save_model(model, tmp_path / "y.safetensors", note="\x1b[2J\nparameters    0")
    assert main(["info", str(tmp_path / "y.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\nparameters ") == 1


def test_convert_keeps_what_a_file_says_of_itself(tmp_path):
    assert main(["convert", "digit-sudoku-4x4", str(tmp_path / "x.safetensors"), "--dtype", "bfloat16"]) == 0
    before, after = (
        ipr_fast.models.files.checkpoints.model_info(s) for s in ("digit-sudoku-4x4", tmp_path / "x.safetensors")
    )
    for key in set(before["metadata"]) - {"source", "config"}:
        assert after["metadata"][key] == before["metadata"][key]
    assert json.loads(after["metadata"]["config"]) == json.loads(before["metadata"]["config"])


def test_convert_writes_the_same_bytes_each_time(tmp_path):
    make_checkpoint(tmp_path / "x.ckpt")
    written = set()
    for i in range(3):
        out = tmp_path / f"{i}.safetensors"
        assert main(["convert", str(tmp_path / "x.ckpt"), str(out), *SIZES]) == 0
        written.add(out.read_bytes())
    assert len(written) == 1
