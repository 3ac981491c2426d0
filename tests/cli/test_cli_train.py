"""`ipr-fast train`: where each setting of a run comes from."""

from dataclasses import asdict, fields

import pytest
import torch

from ipr_fast.cli import train as command
from ipr_fast.cli.main import main
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.tasks.catalog import make_task
from ipr_fast.training import recipe as recipes
from ipr_fast.training.configs import config_of
from ipr_fast.training.recipe import NETWORK_SIZES, Recipe, read_recipe, recipe_names
from ipr_fast.training.trainer import TrainSettings

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
}
SIZES = {"width": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Run a command up to where training begins, and return its settings and its network's configuration."""
    begun = []

    def stop(task, settings, out, *, config, **_):
        begun.append((settings, config))
        raise KeyboardInterrupt

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(command, "train", stop)
            assert main(["train", "--out", str(tmp_path / "run"), "--quiet", *map(str, arguments)]) == 130
        return begun.pop()

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
    settings, config = begin("--recipe", name, "--device", "cpu")
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
    settings, config = begin(*recipe_of_others)
    assert settings == TrainSettings(steps=None, minutes=9.0, **OTHERS)
    assert {size: getattr(config, size) for size in SIZES} == SIZES


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_overrides_a_recipe_even_with_the_default(begin, recipe_of_others, name):
    default = getattr(DEFAULTS, name)
    settings, _ = begin(*recipe_of_others, *option_of(name, default))
    assert settings == TrainSettings(steps=None, minutes=9.0, **{**OTHERS, name: default})


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_is_what_it_says_without_a_recipe(begin, name):
    settings, _ = begin("--task", "even-pixels", *option_of(name, OTHERS[name]))
    assert settings == TrainSettings(**{name: OTHERS[name]})


def test_without_options_the_defaults_hold(begin):
    settings, config = begin()
    assert (settings, config) == (DEFAULTS, config_of(make_task("digit-sudoku-4x4")))


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
        (["--init", "digit-sudoku-9x9", "--task", "even-pixels"], "task even-pixels"),
    ],
)
def test_an_init_that_does_not_fit_is_refused(tmp_path, capsys, options, problem):
    assert main(["train", "--out", str(tmp_path), "--steps", "1", "--quiet", *options]) == 1
    assert problem in capsys.readouterr().err
