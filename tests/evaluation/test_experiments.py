"""Experiments and their table: every arm, on models of a few weights."""

from dataclasses import replace

import pytest
from small_models import randomise

from ipr_fast import Schedule
from ipr_fast.evaluation.arms import Arm
from ipr_fast.evaluation.experiments import ARMS, ONE_PASS, Experiment, ExperimentSettings, run_experiment
from ipr_fast.evaluation.report import report
from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.tasks.catalog import task_of

pytest.importorskip("sklearn")

QUICK = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 0.9), "refine_schedule": (3, 0.9)}


@pytest.fixture(scope="module")
def boards():
    return randomise(PatchTransformer(PatchTransformerConfig(1, 32, 8, box_size=2, **QUICK)), seed=0)


@pytest.fixture(scope="module")
def images():
    return randomise(PatchTransformer(PatchTransformerConfig(3, 32, 4, **QUICK)), seed=0)


def measured(model, **settings):
    return run_experiment(task_of(model.grid), model, "mine", ExperimentSettings(**settings))


def test_every_arm_is_measured_and_reported(boards):
    results = measured(boards, count=6, iters=3, compared=2, arms=ARMS)
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
    assert abs(rows[names[8]]["calls"] - compared["calls"]) <= once  # to whole steps a patch
    assert len(results["good_by_iteration"]) == 4
    table = report(results)
    assert table.count("\n|") == 1 + len(names)
    assert "6 boards, seed 0, intervals 95 %. Judged by a reader that" in table


def test_images_have_their_own_measures_and_no_clues(images):
    results = measured(images, count=4, iters=1, compared=1, arms=("clues",), seed=3)
    assert [row["name"] for row in results["arms"]] == ["one pass", "IPR, alpha 0.25, 1 iteration"]
    assert set(results["arms"][0]["means"]) == {"imbalance", "saturation_std", "value_std"}
    table = report(results)
    assert "| balanced images | gain over one pass | fixed / broken | imbalance | saturation deviation |" in table
    assert "4 images, seed 3, intervals 95 %. Balanced by hue alone, as the benchmark counts" in table


def test_given_clues_make_an_arm_cheaper(boards):
    experiment = Experiment(task_of(boards.grid), boards, ExperimentSettings(count=8, clues=(4, 4)))
    steps = Schedule(2, 0.9).steps(12)
    assert experiment.cost(ONE_PASS, 0) == (steps, 16 + 12 * steps)
    assert len(experiment.reports(Arm("IPR", 2))) == 3  # and the clues have kept their bits, or it would have raised


def test_clues_must_leave_a_cell(boards):
    with pytest.raises(ValueError, match="clues must leave a cell to generate, got 16 clues for 16 cells"):
        Experiment(task_of(boards.grid), boards, ExperimentSettings(count=2, clues=(16, 16)))


def test_the_seed_decides(boards):
    settings = {"count": 4, "iters": 1, "compared": 1, "arms": ()}
    assert measured(boards, **settings) == measured(boards, **settings)
    assert measured(boards, **settings)["arms"] != measured(boards, **settings, seed=1)["arms"]


def test_the_other_arms_have_no_more_iterations_than_ipr_unless_they_are_given():
    settings = ExperimentSettings(iters=3)
    assert [replace(settings, **more).compared_iters for more in ({}, {"iters": 50}, {"compared": 9})] == [3, 20, 9]


def test_few_iterations_are_not_followed_by_more(boards):
    names = [row["name"] for row in measured(boards, count=2, iters=1, arms=())["arms"]]
    assert names == ["one pass", "IPR, alpha 0.25, 1 iteration"]
