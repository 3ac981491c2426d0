"""The measurements of results: every arm on a model of a few weights, and the command that makes a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from small_models import randomise

import ipr_fast
from ipr_fast import Schedule
from ipr_fast.evaluation import intervals
from ipr_fast.models import PatchTransformer, PatchTransformerConfig

pytest.importorskip("sklearn")
import make_model
import quality
import rules

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 0.9), "refine_schedule": (3, 0.9)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Models of the tasks that have learned nothing, as files."""
    configs = {
        "boards": PatchTransformerConfig(1, 32, 8, box_size=2, **QUICK),
        "images": PatchTransformerConfig(3, 32, 4, **QUICK),
    }
    folder = tmp_path_factory.mktemp("weights")
    for name, config in configs.items():
        ipr_fast.save_model(randomise(PatchTransformer(config), seed=0), folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in configs}


def test_every_arm_is_measured_and_reported(weights):
    arms = list(quality.ARMS)
    results = quality.measure(weights["boards"], 6, (0, 0), 3, 2, arms, "cpu") | {"environment": ENVIRONMENT}
    names = [row["name"] for row in results["arms"]]
    assert names == [
        "one pass",
        "IPR, alpha 0.25, 1 iteration",
        "IPR, alpha 0.25, 2 iterations",
        "IPR, alpha 0.25, 3 iterations",
        "IPR, alpha 0.1, 2 iterations",
        "IPR, alpha 0.5, 2 iterations",
        "IPR, alpha 0.25, same region, 2 iterations",
        "IPR, alpha 0.25, same noise, 2 iterations",
        *names[8:10],
        "0 to 8 clues: one pass",
        "0 to 8 clues: IPR, alpha 0.25, 2 iterations",
    ]
    assert names[8].startswith("one pass, ")
    assert names[9].startswith("renoise everything ")
    rows = {row["name"]: row for row in results["arms"]}
    once, twice = Schedule(2, 0.9).steps(16), Schedule(3, 0.9).steps(4)
    assert rows["one pass"]["calls"] == once
    assert rows["one pass"]["evaluations"] == 16 + 16 * once
    compared = rows["IPR, alpha 0.25, 2 iterations"]
    assert compared["calls"] == once + 2 * twice
    assert compared["evaluations"] == 16 + 16 * once + 2 * (16 + 4 * twice)
    assert abs(rows[names[8]]["calls"] - compared["calls"]) <= once  # as near as whole steps a patch come
    assert len(results["good_by_iteration"]) == 4
    table = quality.report(results)
    assert table.count("\n|") == 1 + len(names)
    assert "6 boards, seed 0, intervals 95 %. Judged by a reader that" in table


def test_images_have_their_own_measures_and_no_clues(weights):
    results = quality.measure(weights["images"], 4, (0, 0), 1, 1, ["clues"], "cpu") | {"environment": ENVIRONMENT}
    assert [row["name"] for row in results["arms"]] == ["one pass", "IPR, alpha 0.25, 1 iteration"]
    assert set(results["arms"][0]["means"]) == {"imbalance", "saturation_std", "value_std"}
    table = quality.report(results)
    assert "| balanced images | gain over one pass | fixed / broken | imbalance | saturation deviation |" in table
    assert "4 images, seed 0, intervals 95 %. Balanced by hue alone, as the benchmark counts" in table


def test_given_clues_make_an_arm_cheaper(weights):
    bench = quality.Bench(weights["boards"], 8, (4, 4), "cpu")
    assert bench.free == [12] * 8
    assert bench.first() == (Schedule(2, 0.9).steps(12), 16 + 12 * Schedule(2, 0.9).steps(12))
    assert len(bench.refine(ipr_fast.random_patches(), 2, bench.refine_plan)) == 3  # and clues have kept their bits


ENVIRONMENT = {"commit": "0" * 12, "device": "a device", "torch": "2", "threads": 1}


def test_a_mean_has_its_interval():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    value, low, high = intervals.mean(values)
    half = intervals.Z * (5 / 3) ** 0.5 / 2
    assert (value, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert intervals.mean(torch.tensor([7])) == (7.0, -float("inf"), float("inf"))
    assert intervals.Estimate(0.12345, 0.1, 0.15).plain() == "0.123 [0.100, 0.150]"
    assert intervals.Estimate(512.0, 8.0, 0.0).plain() == "512 [8.00, 0.00]"


@pytest.fixture
def quick_recipe(monkeypatch):
    options = "--batch-size 2 --width 16 --depth 1 --num-heads 1 --save-every 5"
    monkeypatch.setitem(make_model.RECIPES, "even-pixels", make_model.Recipe(options, options))


@pytest.mark.usefixtures("quick_recipe")
def test_one_command_makes_a_model(tmp_path, capsys):
    assert make_model.make("even-pixels", 0.02, tmp_path, False, 2, 1, 1, "cpu") == 0
    path = tmp_path / "even-pixels.safetensors"
    model = ipr_fast.load_model(path)
    assert model.role.weight.dtype == torch.float16
    assert model.grid.sample_shape == (3, 32, 32)
    measured = json.loads((tmp_path / "quality-even-pixels.json").read_text())
    assert measured["model"] == "even-pixels"
    assert measured["samples"] == 2
    assert "| one pass |" in capsys.readouterr().out
    assert make_model.make("even-pixels", 0.02, tmp_path, False, 2, 1, 1, "cpu") == 1  # it exists: --resume
    assert "resume that run" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_recipe")
def test_a_model_too_large_to_ship_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_model, "LARGEST", 100)
    assert make_model.make("even-pixels", 0.01, tmp_path, False, 0, 1, 1, "cpu") == 1
    assert "are more than 100" in capsys.readouterr().err


@pytest.mark.parametrize("name", make_model.RECIPES)
def test_recipes_are_options_of_the_command_line_and_fit(name):
    from ipr_fast.cli.main import build_app
    from ipr_fast.tasks.catalog import make_task
    from ipr_fast.training.configs import config_of

    command = typer.main.get_command(build_app()).commands["train"]
    for options in (make_model.RECIPES[name].gpu, make_model.RECIPES[name].cpu):
        command.make_context("train", ["--task", name, "--out", "x", *options.split()])
    config = config_of(make_task(name))
    with torch.device("meta"):
        largest = sum(p.numel() for p in PatchTransformer(config).parameters())
    assert 7e6 < largest < make_model.LARGEST / 2 - 10_000  # two bytes a weight, and the header


def test_the_question_of_gaps_is_answered_right_by_who_knows(monkeypatch):
    """A model that returns the clean patches fills every gap; one that returns nothing, hardly any."""
    task = rules.DigitSudoku(9)
    gaps = rules.Gaps(task)

    class Oracle:
        def predict(self, noisy, levels, is_active):
            assert (is_active.sum(1) == 20).all()
            assert torch.equal(levels, is_active.float())
            return ipr_fast.Prediction(noisy - gaps.patches, None, None)

    class Blank:
        def predict(self, noisy, levels, is_active):
            return ipr_fast.Prediction(noisy + 1, None, None)

    assert gaps.filled(Oracle(), 20) > 0.98  # the reader misreads one digit in two hundred
    assert gaps.filled(Blank(), 20) < 0.2
    assert torch.equal(gaps.noise[0], rules.Gaps(task).noise[0])


def test_the_scripts_tell_what_they_take():
    for script in ("quality.py", "make_model.py", "rules.py"):
        done = subprocess.run([sys.executable, str(ROOT / "bench" / script), "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--out" in done.stdout
