"""Counting Polygons from the command line: trained, pictured, and evaluated by either judge."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import randomise
from small_plans import QUICK

import ipr_fast
from ipr_fast.cli.main import main
from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.tasks.polygons.classifier import PREFIX, PolygonsClassifier

CONFIG = {"min_vertices": 3, "max_vertices": 7, "min_num_polygons": 1, "max_num_polygons": 9}
PLAN = """
title = "Polygons"
task = "counting-polygons"
model = "{model}"
samples = 4
batch = 2
seeds = [0]
kept = 2
{more}

[arms."one pass"]

[arms.refined]
iterations = 2
"""


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    ipr_fast.save_model(randomise(PatchTransformer(PatchTransformerConfig(3, 128, 8, **QUICK)), seed=0), path)
    return str(path)


@pytest.mark.parametrize(
    ("backgrounds", "task", "asked"),
    [
        ("pictures", "counting-polygons-pictures", "--backgrounds"),
        ("plain", "counting-polygons-plain", "--backgrounds plain"),
    ],
)
def test_a_model_is_trained_over_other_backgrounds(tmp_path, capsys, backgrounds, task, asked):
    image_of = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    image_of.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(tmp_path / "pictures" / "grey.png")
    chosen = str(tmp_path / "pictures") if backgrounds == "pictures" else backgrounds
    options = ["--width", "16", "--depth", "1", "--num-heads", "1", "--batch-size", "2", "--evaluate", "0", "--quiet"]
    command = ["train", "--task", "counting-polygons", "--steps", "1", "--out", str(tmp_path / "run"), *options]
    assert main([*command, "--backgrounds", chosen]) == 0
    model = ipr_fast.load_model(tmp_path / "run" / "model.safetensors")
    assert model.grid.sample_shape == (3, 128, 128)
    assert model.generate_schedule == ipr_fast.Schedule(10, 0.9)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["task"] == task
    capsys.readouterr()
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "2", "--quiet", "--evaluate", "0"]
    for again in ([], ["--task", "counting-polygons"]):
        assert main([*resume, *again]) == 1
        assert f"{asked} must be given" in capsys.readouterr().err
    assert main([*resume, "--backgrounds", chosen]) == 0


def test_the_demo_draws_its_pictures(tmp_path, weights, capsys):
    options = ["--count", "3", "--iters", "2", "--out", str(tmp_path / "demo"), "--quiet"]
    assert main(["demo", "--model", weights, *options]) == 0
    out = capsys.readouterr().out
    for words in ("3 images of counting-polygons, 128x128 pixels", "of 3 consistent", "mismatch", "held-out images"):
        assert words in out
    assert len(list((tmp_path / "demo").glob("*.png"))) == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_plan_is_run_and_reported(tmp_path, weights, own):
    pytest.importorskip("pyarrow")
    more = ""
    if own:
        folder = tmp_path / "classifier"
        folder.mkdir()
        torch.manual_seed(0)
        state = PolygonsClassifier((3, 7), (1, 9)).state_dict()
        save_file({PREFIX + name: value for name, value in state.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        more = f'classifier = "{folder}"'
    (tmp_path / "plan.toml").write_text(PLAN.format(model=weights, more=more))
    run = str(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "plan.toml"), "--out", run, "--quiet"]) == 0
    assert main(["report", run]) == 0
    summary = json.loads((tmp_path / "run" / "report" / "run.json").read_text())
    assert summary["task"] == "counting-polygons"
    assert summary["adjective"] == "consistent"
    assert ("benchmark's classifier" if own else "held-out images") in summary["judge"]
    measured = set(json.dumps(summary["arms"][1]["points"][-1]).replace('"', " ").split())
    assert {"mismatch", "wrong_numbers", "mixed_vertices", "odd_polygons", "strays"} <= measured


def test_a_classifier_of_another_task_is_refused(tmp_path, capsys):
    (tmp_path / "plan.toml").write_text(
        PLAN.format(model="even-pixels", more='classifier = "x"').replace("counting-polygons", "even-pixels")
    )
    assert main(["evaluate", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "run"), "--quiet"]) == 1
    assert "classifier: even-pixels has none" in capsys.readouterr().err
