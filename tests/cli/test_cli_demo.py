"""ipr-fast demo: what it counts, draws and says."""

import json
import sys

import pytest

import ipr_fast
from ipr_fast.cli.main import main


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


def test_the_demo_needs_pictures_before_it_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("ipr_fast.evaluation.demo.follow", lambda *args, **kwargs: 1 / 0)
    assert main(["demo", "--quiet", "--out", str(tmp_path / "demo")]) == 1
    assert "pictures need matplotlib" in capsys.readouterr().err
