"""`ipr-fast train`: where each setting of a run comes from."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from ipr_fast.cli import train as command
from ipr_fast.cli.main import main
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.tasks.catalog import make_task
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.training import recipe as recipes
from ipr_fast.training.configs import config_of
from ipr_fast.training.recipe import NETWORK_SIZES, Recipe, read_recipe, recipe_names
from ipr_fast.training.run import CHECKPOINT
from ipr_fast.training.trainer import MAY_CHANGE, Trainer, TrainSettings

pytest.importorskip("sklearn")
DEFAULTS = TrainSettings()
# A value other than the default for each setting, but for the end and the seed.
OTHERS = {
    "batch_size": 3,
    "learning_rate": 2e-4,
    "warmup": 7,
    "weight_decay": 0.125,
    "ema_decay": 0.5,
    "clip_norm": 2.0,
    "save_every": 11,
    "dtype": "bfloat16",
    "compile": True,
    "optimizer": "muon",
    "symbol_weight": 0.25,
    "mean_weight": 3.0,
    "few_active": 0.25,
    "own_patches": 0.25,
}
SIZES = {"width": 48, "depth": 2, "num_heads": 3}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Run a command up to where training begins, and return its settings, its network's configuration and its task.

    Where the command is to fail, return None.
    """
    begun = []

    def stop(task, settings, out, *, config, **_):
        begun.append((settings, config, task.name))
        raise KeyboardInterrupt

    def run(*arguments, fails=False):
        with monkeypatch.context() as patch:
            patch.setattr(command, "train", stop)
            ended = main(["train", "--out", str(tmp_path / "run"), "--quiet", *map(str, arguments)])
        assert ended == (1 if fails else 130)
        return None if fails else begun.pop()

    return run


def option_of(name, value):
    """The words of the command line that give a setting this value."""
    word = f"--{name.replace('_', '-')}"
    return [word if value else f"--no-{name}"] if isinstance(value, bool) else [word, value]


def test_the_settings_below_are_all():
    assert {each.name for each in fields(TrainSettings)} == {*OTHERS, "steps", "minutes", "seed"}
    assert all(value != getattr(DEFAULTS, name) for name, value in OTHERS.items())
    assert set(SIZES) == set(NETWORK_SIZES)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_where_no_option_is_given(begin, monkeypatch, name, device_type):
    recipe, read = read_recipe(name), Recipe.options
    monkeypatch.setattr(Recipe, "options", lambda recipe, _: read(recipe, device_type))
    settings, config, _ = begin("--recipe", name, "--device", "cpu")
    chosen = {**asdict(DEFAULTS), **recipe.options(device_type), "steps": None, "minutes": recipe.minutes}
    assert asdict(settings) == {key: chosen[key] for key in asdict(settings)}
    own = config_of(make_task(recipe.task))
    assert all(getattr(config, size) == chosen.get(size, getattr(own, size)) for size in NETWORK_SIZES)


@pytest.fixture
def recipe_of_others(tmp_path, monkeypatch):
    """A recipe that sets everything that a recipe can."""
    text = "\n".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for name, value in {**OTHERS, **SIZES}.items()
    )
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "even-pixels.toml").write_text(
        f'task = "even-pixels"\nminutes = 9.0\n[gpu]\n{text}\n[cpu]\n{text}\n[evaluate]\n'
    )
    return ["--recipe", "even-pixels"]


def test_a_recipe_may_set_everything(begin, recipe_of_others):
    settings, config, _ = begin(*recipe_of_others)
    assert settings == TrainSettings(steps=None, minutes=9.0, **OTHERS)
    assert {size: getattr(config, size) for size in SIZES} == SIZES


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_overrides_a_recipe_even_with_the_default(begin, recipe_of_others, name):
    default = getattr(DEFAULTS, name)
    settings, *_ = begin(*recipe_of_others, *option_of(name, default))
    assert settings == TrainSettings(steps=None, minutes=9.0, **{**OTHERS, name: default})


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_is_what_it_says_without_a_recipe(begin, name):
    settings, *_ = begin("--task", "even-pixels", *option_of(name, OTHERS[name]))
    assert settings == TrainSettings(**{name: OTHERS[name]})


def test_without_options_the_defaults_hold(begin):
    task = make_task("digit-sudoku-4x4")
    assert begin() == (DEFAULTS, config_of(task), task.name)


# ------------------------------------------------------------------------------------------------------- resumed runs

UNFINISHED = TrainSettings(steps=50, seed=5, **OTHERS)


@pytest.fixture
def unfinished(tmp_path):
    """The checkpoint of a run in which nothing is as usual, and the run's network."""
    task = EvenPixels()
    config = replace(config_of(task), **SIZES)
    (tmp_path / "run").mkdir()
    Trainer(task, replace(UNFINISHED, compile=False), config=config).save(tmp_path / "run" / CHECKPOINT)
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    state["settings"]["compile"] = True
    torch.save(state, tmp_path / "run" / CHECKPOINT)
    return config


@needs_muon
@pytest.mark.parametrize("more", [[], ["--task", "even-pixels"], ["--recipe", "even-pixels"]], ids=str)
def test_a_resumed_run_goes_on_with_its_settings(begin, unfinished, more):
    assert begin("--resume", *more) == (UNFINISHED, unfinished, "even-pixels")


@needs_muon
@pytest.mark.parametrize("name", [*OTHERS, *SIZES, "seed"])
def test_an_option_that_is_given_again_must_be_the_same_unless_it_may_change(begin, unfinished, capsys, name):
    before = {**asdict(UNFINISHED), **SIZES}[name]
    assert begin("--resume", *option_of(name, before)) == (UNFINISHED, unfinished, "even-pixels")
    after = {"dtype": "float32", "compile": False, "optimizer": "adamw", "num_heads": 1}.get(name, 2 * before)
    if name in MAY_CHANGE:
        assert begin("--resume", *option_of(name, after))[0] == replace(UNFINISHED, **{name: after})
    else:
        begin("--resume", *option_of(name, after), fails=True)
        said = f"checkpoint.pt: a run of other settings: {name} {before} (now {after})\n"
        assert capsys.readouterr().err.endswith(said)


@needs_muon
def test_a_resumed_run_may_end_elsewhere(begin, unfinished):
    assert begin("--resume", "--steps", 60)[0] == replace(UNFINISHED, steps=60)
    assert begin("--resume", "--minutes", 1)[0] == replace(UNFINISHED, steps=None, minutes=1.0)
    assert begin("--resume", "--steps", 60, "--minutes", 1)[0] == replace(UNFINISHED, steps=60, minutes=1.0)


@needs_muon
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "digit-sudoku-4x4"], "task even-pixels (now digit-sudoku-4x4)"),
        (["--recipe", "digit-sudoku-9x9"], "task even-pixels (now digit-sudoku-9x9)"),
        (["--seed", 1, "--width", 96], "width 48 (now 96), seed 5 (now 1)"),
        (["--mnist", "absent"], "mnist: even-pixels has no digit images"),
        (["--backgrounds", "absent"], "backgrounds: even-pixels has none"),
    ],
)
def test_another_run_is_not_resumed(begin, unfinished, capsys, options, said):
    begin("--resume", *options, fails=True)
    assert said in capsys.readouterr().err


@needs_muon
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "digit-sudoku-4x4-mnist"}, "--mnist must be given: "),
        ({"task": "counting-polygons-pictures"}, "--backgrounds must be given: "),
        ({"task": "stripes"}, "checkpoint.pt: the task must be one of digit-sudoku-4x4, digit-sudoku-9x9, even-pixels"),
        ({"settings": {"colour": 3}}, "checkpoint.pt: not a checkpoint of this version"),
        ({"config": '{"colour": 3}'}, "checkpoint.pt: not a checkpoint of this version"),
    ],
)
def test_a_checkpoint_that_the_command_cannot_go_on_from_is_named(tmp_path, begin, unfinished, capsys, change, said):
    path = tmp_path / "run" / CHECKPOINT
    torch.save(torch.load(path, weights_only=True) | change, path)
    begin("--resume", fails=True)
    assert said in capsys.readouterr().err


def test_without_a_checkpoint_resume_begins(begin):
    assert begin("--resume", "--task", "even-pixels")[0] == DEFAULTS


@pytest.mark.parametrize("name", ["even-pixels.safetensors", "quality-even-pixels.json"])
def test_a_folder_in_the_place_of_a_recipes_file_is_found_before_the_run(tmp_path, begin, capsys, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    begin("--recipe", "even-pixels", fails=True)
    assert f"{name}: is a folder, in the place of a file" in capsys.readouterr().err


def test_a_recipe_is_not_for_another_task(begin, capsys):
    begin("--recipe", "even-pixels", "--task", "digit-sudoku-4x4", fails=True)
    assert "--task must be that of the recipe, even-pixels, got digit-sudoku-4x4" in capsys.readouterr().err


def test_a_network_too_large_for_a_recipe_is_refused_before_the_run(begin, capsys):
    begin("--recipe", "even-pixels", "--width", 480, fails=True)
    assert "--recipe: a bundled model must have at most 16,777,216 bytes, got " in capsys.readouterr().err


def test_init_gives_a_run_its_weights_and_sizes(tmp_path):
    options = ["--steps", 1, "--batch-size", 2, "--evaluate", 0, "--learning-rate", 1e-30, "--quiet"]
    assert main(["train", "--init", "digit-sudoku-4x4", "--out", str(tmp_path), *map(str, options)]) == 0
    before, after = (load_model(source).state_dict() for source in ("digit-sudoku-4x4", tmp_path / "model.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--init", "absent"], "error: --init must be"),
        (["--init", "digit-sudoku-9x9", "--task", "digit-sudoku-9x9", "--depth", "2"], "got depth 6 (now 2)"),
        (
            ["--init", "digit-sudoku-9x9", "--task", "even-pixels", "--own-patches", "0.5"],
            "samples (3, 32, 32) in patches (4, 4), as task even-pixels has, got samples (1, 72, 72)",
        ),
        (["--init", "token-sudoku-9x9", "--task", "token-sudoku-4x4"], "16 tokens of 5, as task token-sudoku-4x4 has"),
        (["--init", "token-sudoku-9x9"], "--init must be a model of samples (1, 32, 32)"),
    ],
)
def test_an_init_that_does_not_fit_is_refused(tmp_path, capsys, options, problem):
    assert main(["train", "--out", str(tmp_path), "--steps", "1", "--quiet", *options]) == 1
    assert problem in capsys.readouterr().err
