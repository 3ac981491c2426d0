"""Commands on a disk that is full or cannot be written: one line each, and no half of a file."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import failed_in_one_line
from full_disk import full_disk

from ipr_fast.cli.main import main


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
