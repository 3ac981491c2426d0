"""Plans of experiments: those of the package, one's own, and what is refused."""

import json

import pytest

import ipr_fast
from ipr_fast.evaluation.arms import Arm
from ipr_fast.evaluation.scale.plan import Comparison, Plan, plan_names, read_plan

NAMES = [
    *("ablation-noise", "ablation-ratio", "ablation-region", "compute-matched", "counting-polygons"),
    *("counting-polygons-small", "even-pixels", "sudoku-corrupted", "sudoku-hard"),
]
OWN = """
title = "Mine"
task = "digit-sudoku-4x4"
model = "some/file.safetensors"
samples = 10
seeds = [3]

[arms.first]

[arms.other]
generate = { steps_per_patch = 5, overlap = 0.0 }

[arms.refined]
iterations = 7
accept = 0.5
"""


@pytest.fixture
def own(tmp_path):
    def write(text):
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return write


def test_the_experiments_of_the_paper_come_with_the_package():
    assert plan_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_of_the_package_runs_on_a_bundled_or_published_model_with_five_seeds(name):
    plan = read_plan(name)
    assert plan.name == name
    assert plan.model in ipr_fast.bundled_models() or plan.config in ipr_fast.models.PRESETS
    assert len(plan.seeds) == 5
    assert plan.comparisons
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_of_ones_own(own):
    plan = read_plan(own(OWN))
    assert plan.name == "mine"
    assert plan.seeds == (3,)
    assert plan.arm("refined") == Arm("refined", 7, accept=0.5)
    assert plan.comparisons == (Comparison("other", "first"), Comparison("refined"))
    assert plan.iterations(plan.arm("refined")) == [0, 1, 2, 5, 7]
    assert plan.iterations(plan.arm("first")) == [0]
    assert plan.changed(samples=3, model=None).samples == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN.replace("samples = 10", ""), "there is no samples$"),
        (OWN.replace("samples = 10", "samples = 0"), "samples must be an int in 1..4294967296, got 0"),
        (
            OWN.replace("samples = 10", "samples = 1048577\nbatch = 1"),
            "samples must be at most 1048576 for each of 1 seeds with batch 1, got 1048577: a run has at most 1048576 ",
        ),
        (OWN + "ratio = 2", "arm refined: ratio must be"),
        (OWN.replace("digit-sudoku-4x4", "chess"), "task must be one of digit-sudoku-4x4, .* got 'chess'"),
        (OWN.replace("accept", "reward"), "arm refined has no reward; an arm has iterations, policy"),
        (OWN + '[[compare]]\narm = "first"\nwith = "last"', "there is no arm 'last'; the arms are first, other"),
        (OWN + '[[compare]]\nwith = "first"', "compare must be tables .* with arm"),
        (OWN.split("[arms")[0], "there is no arms$"),
        ("recorded = [-1]\n" + OWN, "recorded must be an int"),
        ("clues = [5, 2]\n" + OWN, r"clues must be \[LOW, HIGH\] with LOW <= HIGH"),
        ("clues = 3\n" + OWN, "clues must be a list, got 3"),
        ("foo = 1\n" + OWN, "a plan has no foo; it has title"),
        (OWN.split("[arms")[0] + "arms = 3", r"arms must be tables"),
        (OWN + '[[compare]]\narm = "first"\nwiht = "other"', "compare must be tables"),
        (OWN + "stochasticity = 2", "arm .*stochasticity must be a finite number in"),
        (OWN.replace("iterations = 7", "iterations = true"), "arm .*iterations must be an int"),
        ("title = ", "Invalid value"),
    ],
)
def test_a_wrong_plan_is_told_with_its_name(own, text, said):
    with pytest.raises(ValueError, match=rf"experiment .*mine\.toml: .*{said}"):
        read_plan(own(text))


def test_an_unknown_experiment_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"experiment must be one of ablation-noise, .*, or a \.toml file, got 'x'"):
        read_plan("x")
    with pytest.raises(ValueError, match=r"absent\.toml: No such file"):
        read_plan(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize("task", ["even-pixels", "counting-polygons", "counting-polygons-small"])
def test_an_arm_of_violating_cells_needs_a_task_that_names_them(own, task):
    text = OWN + 'policy = "violating"\n'
    assert read_plan(own(text)).arm("refined").policy == "violating"
    with pytest.raises(ValueError, match=f"arm refined: policy violating: {task} has no violating_cells"):
        read_plan(own(text.replace("digit-sudoku-4x4", task)))
