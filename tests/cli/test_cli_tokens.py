"""The commands with a model of tokens."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small_models import randomise

import ipr_fast
from ipr_fast import TokenSchedule, load_model, save_model
from ipr_fast.cli.main import main
from ipr_fast.models import TokenTransformer, TokenTransformerConfig
from ipr_fast.outputs import alone_in
from ipr_fast.tasks.catalog import make_task
from ipr_fast.tasks.rewards import minus_violations
from ipr_fast.training import recipe

BOARDS = TokenTransformerConfig(
    vocabulary_size=5, mask_id=0, rows=4, columns=4, width=16, depth=1, num_heads=1, box_size=2
)


@pytest.fixture
def weights(tmp_path):
    """A file with a model of 4x4 boards of tokens that has learned nothing."""
    save_model(randomise(TokenTransformer(BOARDS), seed=0), tmp_path / "tokens.safetensors")
    return str(tmp_path / "tokens.safetensors")


def run(*arguments, code=0):
    assert main([*map(str, arguments)]) == code


def test_info_describes_it(weights, capsys):
    run("info", weights)
    said = capsys.readouterr().out
    assert "TokenTransformer" in said
    assert "(16,)" in said


def test_convert_stores_it_in_another_type(weights, tmp_path, capsys):
    half = tmp_path / "half.safetensors"
    run("convert", weights, half, "--dtype", "float16")
    model, expected = load_model(half), load_model(weights)
    assert model.config == expected.config
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    run("convert", weights, half, "--refine-schedule", 3, 0.5, code=1)
    assert "a model of tokens has no schedule of patches, got refine_schedule" in capsys.readouterr().err


def test_generate_and_refine_are_the_library_calls(weights, tmp_path):
    x, refined, known = (tmp_path / f"{name}.npy" for name in ("x", "refined", "known"))
    is_known, values = np.zeros((6, 16), dtype=bool), np.full((6, 16), 3)
    is_known[:, :4] = True
    np.save(known, is_known)
    np.save(x, values)
    options = ["--model", weights, "--seed", 5, "--known", known, "--quiet"]
    run("generate", "--count", 6, "--known-values", x, "--out", refined, "--order", "margin", *options)
    model = load_model(weights)
    given = {"model": model, "known": torch.from_numpy(is_known), "seed": 5}
    schedule = TokenSchedule(order="margin")
    expected = ipr_fast.generate_batch(6, known_values=torch.from_numpy(values), schedule=schedule, **given)
    found = np.load(refined)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)
    assert (found[:, :4] == 3).all()
    schedule = TokenSchedule(3, remask="cap", temperature=0.5)
    options += ["--calls", 3, "--remask", "cap", "--temperature", 0.5, "--iters", 2, "--chunk", 4]
    run("refine", refined, "--out", x, *options)
    refined_there = ipr_fast.refine_batch(expected, ipr_fast.random_patches(), 2, schedule=schedule, **given)
    assert np.array_equal(np.load(x), refined_there)
    run("refine", refined, "--out", x, "--accept", "ipr_fast.tasks.rewards:minus_violations", *options)
    rule = ipr_fast.Metropolis(minus_violations)
    accepted = ipr_fast.refine_batch(expected, ipr_fast.random_patches(), 2, schedule=schedule, accept=rule, **given)
    assert np.array_equal(np.load(x), accepted)
    assert not torch.equal(accepted, refined_there)
    assert not (tmp_path / "x.npy.partial").exists()


def test_an_interrupted_refinement_is_resumed(weights, tmp_path, monkeypatch):
    x, options = tmp_path / "x.npy", ["--model", weights, "--quiet"]
    run("generate", "--count", 5, "--out", x, *options)
    options += ["--iters", 3, "--chunk", 2]
    run("refine", x, "--out", tmp_path / "whole.npy", *options)
    refine_batch, calls = ipr_fast.cli.chunks.refine_batch, []

    def interrupted(tokens, policy, iters, **arguments):
        calls.append(iters)
        if sum(map(bool, calls)) == 2:
            raise KeyboardInterrupt
        return refine_batch(tokens, policy, iters, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr("ipr_fast.cli.chunks.refine_batch", interrupted)
        run("refine", x, "--out", tmp_path / "part.npy", *options, code=130)
    run("refine", x, "--out", tmp_path / "part.npy", "--resume", *options)
    assert np.array_equal(np.load(tmp_path / "part.npy"), np.load(tmp_path / "whole.npy"))


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["generate", "--count", 2, "--out", "x.npy", "--schedule", 3, 0.5], "--schedule is for models of images"),
        (["generate", "--count", 2, "--out", "folder"], "PNG files hold images, not tokens"),
        (["generate", "--count", 2, "--out", "x.npy", "--stochasticity", 0.1], "stochasticity must be left at 0.5"),
        (["demo", "--mnist", "here"], "mnist: a model of tokens has no digit images"),
        (["demo", "--swap", 9], "pairs must be at most 8"),
        (["demo", "--swap", 1, "--clues", 0, 3], "--swap starts with all cells free"),
        (["evaluate"], "model: arms is measured on images, got a model of token-sudoku-4x4; see evaluate tokens"),
        (["evaluate", "diversity"], "model: diversity is measured on images"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(weights, tmp_path, monkeypatch, capsys, command, problem):
    monkeypatch.chdir(tmp_path)
    run(*command, "--model", weights, "--quiet", code=1)
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


def test_options_of_tokens_are_refused_for_images(tmp_path, capsys):
    for option in (["--calls", 3], ["--order", "margin"], ["--remask", "cap"]):
        run("generate", "--count", 2, "--out", tmp_path / "x.npy", *option, code=1)
        assert f"{option[0]} is for models of tokens, got a model of images" in capsys.readouterr().err
    run("demo", "--calls", 3, "--out", tmp_path / "demo", code=1)
    assert "--calls is for models of tokens, got a model of digit-sudoku-4x4" in capsys.readouterr().err
    run("evaluate", "tokens", "--model", "digit-sudoku-4x4", code=1)
    assert "model: this is an experiment on tokens, got a model of digit-sudoku-4x4" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--clues", 2, 8], ["--swap", 2]], ids=["generation", "completion", "repair"])
def test_the_demo_draws_boards(weights, tmp_path, capsys, options):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    run("demo", "--model", weights, "--count", 7, "--iters", 2, "--calls", 3, "--out", out, "--quiet", *options)
    results, said = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert results["boards"] == 7
    assert len(results["valid_by_iteration"]) == 3
    assert ("clues_kept" in results) == ("--clues" in options)
    assert results.get("clues_kept", 7) == 7
    for words in ("7 boards of tokens, 3 calls, 4x4 cells", "of 7 valid", "violations"):
        assert words in said
    assert ("with 2 swapped pairs" in said) == ("--swap" in options)
    for picture in ("boards.png", "progress.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_train_evaluates_what_it_trained(tmp_path, capsys):
    options = ["--width", 16, "--depth", 1, "--num-heads", 1, "--batch-size", 4, "--steps", 3]
    run("train", "--task", "token-sudoku-4x4", "--out", tmp_path, *options, "--evaluate", 5, "--iters", 1)
    captured = capsys.readouterr()
    assert "of 5 valid" in captured.out
    assert "cross-entropy" in captured.err
    assert json.loads((tmp_path / "evaluation.json").read_text())["boards"] == 5
    assert load_model(tmp_path / "model.safetensors").length == make_task("token-sudoku-4x4").length
    run("train", "--task", "token-sudoku-4x4", "--out", tmp_path / "on", "--steps", 1, "--evaluate", 0,
        "--init", tmp_path / "model.safetensors", "--batch-size", 2, "--quiet")  # fmt: skip
    assert load_model(tmp_path / "on" / "model.safetensors").config.width == 16


def test_a_killed_run_ends_with_the_weights_of_a_whole_one(tmp_path):
    """SIGKILL in the middle of `ipr-fast train`, then --resume to the end."""
    sizes = ["--width", 16, "--depth", 1, "--num-heads", 1, "--batch-size", 4, "--save-every", 4]
    options = ["--task", "token-sudoku-4x4", *sizes, "--steps", 400, "--evaluate", 0, "--quiet"]
    killed = [sys.executable, "-m", "ipr_fast", "train", *options, "--out", tmp_path / "killed"]
    process = subprocess.Popen(
        [*map(str, killed)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    checkpoint, deadline = tmp_path / "killed" / "checkpoint.pt", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 400
    run("train", *options, "--resume", "--out", tmp_path / "killed")
    run("train", *options, "--out", tmp_path / "whole")
    found, expected = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_repair_and_orders_are_measured_and_reported(weights, tmp_path, capsys):
    out = tmp_path / "out.json"
    run("evaluate", "repair", "--model", weights, "--count", 4, "--iters", 2, "--pairs", "0,2", "--out", out, "--quiet")
    repair = json.loads(out.read_text())["repair"]
    assert [arm["pairs"] for arm in repair] == [0, 2]
    assert repair[0]["valid_by_iteration"][0] == 4
    command = ("evaluate", "tokens", "--model", weights, "--count", 6, "--clues", 0, 8, "--out", out, "--quiet")
    run(*command, "--keep", tmp_path / "kept")
    table = capsys.readouterr().out
    with alone_in(tmp_path / "kept"):
        run(*command, "--keep", tmp_path / "kept", code=1)
    assert f"{tmp_path / 'kept'}: another run is at work there" in capsys.readouterr().err
    run("evaluate", "--report", out, "--plot", tmp_path / "curve.png")
    assert capsys.readouterr().out in table
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    run("evaluate", "--plot", tmp_path / "curve.png", code=1)
    assert "--plot draws the measurement of --report" in capsys.readouterr().err
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows][:2] == ["one pass, confidence", "confidence and IPR, alpha 0.1"]
    assert all(cell["calls"] <= cell["budget"] for row in rows for cell in row["cells"])


def test_a_recipe_stores_and_measures_a_model_of_tokens(tmp_path, monkeypatch, capsys):
    options = "batch_size = 2\nwidth = 16\ndepth = 1\nnum_heads = 1"
    text = f'task = "token-sudoku-4x4"\nminutes = 9.0\n[gpu]\n{options}\n[cpu]\n{options}\n[evaluate]\n'
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    (tmp_path / "even-pixels.toml").write_text(f"{text}count = 3\nclues = [0, 8]\nbudgets = [16, 4]\n")
    command = ["train", "--recipe", "even-pixels", "--out", tmp_path / "run", "--steps", 2, "--quiet"]
    run(*command, "--iters", 3, code=1)
    assert "--iters is not a setting of the experiment on token-sudoku-4x4" in capsys.readouterr().err
    run(*command)
    stored = load_model(tmp_path / "run" / "even-pixels.safetensors")
    assert stored.config.width == 16
    assert {weight.dtype for weight in stored.parameters()} == {torch.float16}
    measured = json.loads((tmp_path / "run" / "quality-even-pixels.json").read_text())
    assert (measured["samples"], measured["clues"], measured["budgets"]) == (3, [0, 8], [16, 4])
    assert "| one pass, margin |" in capsys.readouterr().out
