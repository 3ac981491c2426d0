"""`ipr-fast evaluate`, and `ipr-fast train --recipe`, on models of a few weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from small_models import randomise

import ipr_fast
from ipr_fast.cli import train
from ipr_fast.cli.main import main
from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.training import recipe

pytest.importorskip("sklearn")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
QUICK = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 0.9), "refine_schedule": (3, 0.9)}


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """A model of 4x4 boards that has learned nothing, as a file."""
    path = tmp_path_factory.mktemp("weights") / "boards.safetensors"
    model = randomise(PatchTransformer(PatchTransformerConfig(1, 32, 8, box_size=2, **QUICK)), seed=0)
    ipr_fast.save_model(model, path)
    return str(path)


def evaluated(capsys, *arguments):
    """The output of a run that must end well."""
    assert main(["evaluate", *map(str, arguments), "--quiet"]) == 0
    return capsys.readouterr().out


def test_arms_are_measured_written_and_printed_again(tmp_path, boards, capsys):
    out = tmp_path / "made" / "quality.json"
    options = ["--model", boards, "--count", 4, "--iters", 2, "--compared", 1, "--clues", 0, 4, "--seed", 5]
    printed = evaluated(capsys, *options, "--arms", "alphas,fixed", "--out", out)
    results = json.loads(out.read_text())
    assert results["model"] == boards
    assert (results["samples"], results["clues"], results["seed"]) == (4, [0, 4], 5)
    assert [row["name"] for row in results["arms"]][3:5] == [f"IPR, alpha {a}, 1 iteration" for a in (0.1, 0.5)]
    assert len(results["arms"]) == 7
    assert "4 boards, 0 to 4 clues, seed 5" in printed
    assert evaluated(capsys, "--report", out) == printed
    assert len(evaluated(capsys, *options, "--arms", "none").splitlines()) == 2 + 3 + 2


def test_repair_is_measured(tmp_path, boards, capsys):
    options = ["--model", boards, "--count", 3, "--iters", 2, "--pairs", "0,2", "--out", tmp_path / "repair.json"]
    printed = evaluated(capsys, "repair", *options)
    assert printed.startswith("| swapped pairs | corrupted | after 1 | after 2 |")
    assert [line[:4] for line in printed.splitlines()[2:4]] == ["| 0 ", "| 2 "]
    assert evaluated(capsys, "--report", tmp_path / "repair.json") == printed


def test_diversity_and_initialisation_are_measured_too(tmp_path, boards, capsys, monkeypatch):
    printed = evaluated(capsys, "diversity", "--model", boards, "--count", 4, "--iters", 1, "--out", tmp_path / "d")
    assert printed.startswith("After one pass, ")
    assert evaluated(capsys, "--report", tmp_path / "d") == printed
    monkeypatch.setattr("ipr_fast.evaluation.initialisation.SIZES", {"width": 32, "depth": 1, "num_heads": 1})
    printed = evaluated(capsys, "initialisation", "--count", 64, "--every", 64, "--seed", 7)
    assert "| 64 | " in printed
    assert "seed 7" in printed


def test_a_model_without_a_dtype_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "callable_model.py").write_text(
        "import ipr_fast\n\n\nclass Model:\n    grid = ipr_fast.PatchGrid(1, 32, 32, 8)\n\n"
        "    def __call__(self, patches, levels, active=None):\n"
        "        return ipr_fast.Prediction(patches if active is None else active.gather(patches))\n"
    )
    options = ["--count", 2, "--iters", 1, "--compared", 1, "--arms", "none"]
    assert "| one pass | " in evaluated(capsys, "--model", "callable_model:Model", *options)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in RESULTS.glob("*.json") if path.name[:4] in ("qual", "repa", "dive", "init"))
)
def test_every_recorded_measurement_is_printed(name, capsys):
    text = evaluated(capsys, "--report", RESULTS / name)
    assert "Measured at" in text or "chi-square" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "absent.json"], "absent.json: not a measurement of ipr-fast evaluate (No such file"),
        (["--report", RESULTS / "guard.json", "--out", "x.md"], "--out does not go with --report, which measures"),
        (["--report", RESULTS / "guard.json", "--count", "5"], "--count does not go with --report"),
        (["--report", RESULTS / "guard.json", "--samples"], "--samples does not go with --report"),
        (["--report", RESULTS / "guard.json"], "not a measurement of ipr-fast evaluate"),
        (["--report", RESULTS / "waves.json"], "not a measurement of ipr-fast evaluate"),
        (["--out", "/"], "/: is a folder"),
        (["diversity", "--clues", 1, 2], "--clues is not an option of diversity, which has model, count, iters"),
        (["initialisation", "--model", "x"], "--model is not an option of initialisation, which has count, every"),
        (["--every", 3], "--every is not an option of arms"),
        (["repair", "--pairs", "1,9"], "pairs must be in 0..8, half the cells of a board, got (1, 9)"),
        (["--clues", 16, 16], "clues must leave a cell to generate"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments, said, capsys):
    assert main(["evaluate", *map(str, arguments)]) == 1
    assert said in capsys.readouterr().err


def test_a_full_disk_does_not_lose_a_measurement(tmp_path, boards, capsys):
    """It is printed all the same."""
    options = ["--model", boards, "--count", "2", "--iters", "1", "--arms", "none", "--quiet"]
    with full_disk(50):
        assert main(["evaluate", *options, "--out", str(tmp_path / "q.json")]) == 1
    captured = capsys.readouterr()
    assert "| one pass | " in captured.out
    assert captured.err == f"ipr-fast evaluate: error: [Errno 27] File too large: '{tmp_path / 'q.json'}'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["speed"],
            "must be one of arms, repair, tokens, guidance, steps, diversity, initialisation, ablation-noise, ",
        ),
        (["repair", "--pairs", "1,-2"], "must be whole numbers with commas between, got '1,-2'"),
        (["--arms", "alphas,more"], "some of alphas,fixed,controls,clues, got 'alphas,more'"),
        (["--count", "0"], "--count"),
    ],
)
def test_wrong_usage_is_told(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def quick_recipe(tmp_path, monkeypatch):
    """The recipe of Even Pixels, for a small network."""
    options = 'batch_size = 2\nwidth = 16\ndepth = 1\nnum_heads = 1\nsave_every = 5\ndtype = "bfloat16"'
    text = f'task = "even-pixels"\nminutes = 0.02\n[gpu]\n{options}\n[cpu]\n{options}\n'
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    (tmp_path / "even-pixels.toml").write_text(f"{text}[evaluate]\ncount = 2\niters = 1\ncompared = 1\narms = []\n")


@pytest.mark.usefixtures("quick_recipe")
def test_one_command_makes_a_bundled_model(tmp_path, capsys):
    command = ["train", "--recipe", "even-pixels", "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert main(command) == 0
    path = tmp_path / "run" / "even-pixels.safetensors"
    model = ipr_fast.load_model(path)
    assert model.role.weight.dtype == torch.float16
    assert model.grid.sample_shape == (3, 32, 32)
    measured = json.loads((tmp_path / "run" / "quality-even-pixels.json").read_text())
    assert measured["model"] == "even-pixels"
    assert measured["samples"] == 2
    assert "| one pass |" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"]["minutes"] == 0.02
    assert main(command) == 1
    assert "resume that run" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_recipe")
def test_an_option_overrides_the_recipe(tmp_path):
    options = ["--steps", "1", "--width", "8", "--dtype", "float32", "--no-compile", "--evaluate", "3", "--quiet"]
    assert main(["train", "--recipe", "even-pixels", "--out", str(tmp_path / "run"), "--device", "cpu", *options]) == 0
    settings = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"]
    assert (settings["steps"], settings["minutes"], settings["dtype"]) == (1, None, "float32")
    assert settings["batch_size"] == 2
    assert ipr_fast.load_model(tmp_path / "run" / "even-pixels.safetensors").config.width == 8
    assert json.loads((tmp_path / "run" / "quality-even-pixels.json").read_text())["samples"] == 3


@pytest.mark.usefixtures("quick_recipe")
def test_a_model_too_large_to_bundle_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LARGEST", 100)
    options = ["--out", str(tmp_path / "run"), "--evaluate", "0", "--device", "cpu", "--steps", "1", "--quiet"]
    assert main(["train", "--recipe", "even-pixels", *options]) == 1
    assert "a bundled model must have at most 100 bytes, got " in capsys.readouterr().err
