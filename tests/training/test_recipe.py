"""Recipes, and the networks and settings that they name."""

from dataclasses import fields, replace

import pytest
import torch

from ipr_fast.tasks.catalog import TOKEN_SUDOKU, make_task
from ipr_fast.training import recipe as recipe_module
from ipr_fast.training.configs import config_of, make_network
from ipr_fast.training.recipe import LARGEST, NETWORK_SIZES, read_recipe, recipe_names
from ipr_fast.training.trainer import TrainSettings


def test_the_recipes():
    others = ["digit-sudoku-9x9", "even-pixels", "token-sudoku-9x9"]
    assert recipe_names() == ["counting-polygons", "counting-polygons-small", *others]


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_a_model_that_fits(name, device_type):
    recipe = read_recipe(name)
    options = recipe.options(device_type)
    sizes = {name: options.pop(name) for name in NETWORK_SIZES if name in options}
    assert TrainSettings(steps=None, minutes=recipe.minutes, **options).minutes == 25
    with torch.device("meta"):
        model = make_network(replace(config_of(make_task(recipe.task)), **sizes))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights < LARGEST / 2 - 10_000  # two bytes a weight, and the header
    small = ("token-sudoku-9x9", "counting-polygons-small")
    assert (weights > 7e6) == (device_type == "cuda" and name not in small)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task = ", "recipe bad: "),
        ("task = 'even-pixels'", "recipe bad: .*missing"),
        ("task = 'chess'\nminutes = 1\ngpu = {}\ncpu = {}", "task must be one of digit-sudoku-4x4, .*, got 'chess'"),
        ("task = 'even-pixels'\nminutes = 1\ngpu = {}\ncpu = {size = 1}", "no options of training: size"),
        ("task = 'even-pixels'\nminutes = 1\ngpu = {seed = 1}\ncpu = {steps = 2}", "of training: seed, steps"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, monkeypatch, text, problem):
    monkeypatch.setattr(recipe_module, "FOLDER", tmp_path)
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_recipe("bad")


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"recipe must be one of counting-polygons, .*, got '\.\./x'"):
        read_recipe("../x")


def test_the_settings_of_the_experiment_exist():
    from ipr_fast.evaluation.experiments import ExperimentSettings
    from ipr_fast.evaluation.tokens import TokenExperimentSettings

    for name in recipe_names():
        settings = TokenExperimentSettings if name in TOKEN_SUDOKU else ExperimentSettings
        assert set(read_recipe(name).evaluate) <= {each.name for each in fields(settings)}
