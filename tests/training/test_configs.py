"""The network of each task, and how its training begins."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ipr_fast.models import PatchTransformer, PatchTransformerConfig, TokenTransformerConfig
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.tasks.counting_polygons import CountingPolygons
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku
from ipr_fast.training.configs import config_of, initialise, make_network


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_network_has_its_samples(name):
    task = make_task(name)
    config = config_of(task)
    if isinstance(task, TokenSudoku):
        assert (config.vocabulary, config.length) == (task.vocabulary, task.length)
        return
    assert PatchGrid(config.channels, config.image_size, config.image_size, config.patch_size) == task.grid


def test_the_networks_of_the_tasks():
    small, large, even, polygons, few, small_tokens, tokens = (config_of(make_task(name)) for name in TASKS)
    assert small == PatchTransformerConfig(channels=1, image_size=32, patch_size=8, box_size=2)
    size = {"width": 256, "depth": 9, "num_heads": 8}
    assert large == PatchTransformerConfig(channels=1, image_size=72, patch_size=8, box_size=3, **size)
    board = {"vocabulary_size": 10, "mask_id": 0, "rows": 9, "columns": 9, "box_size": 3}
    assert tokens == TokenTransformerConfig(width=128, depth=6, num_heads=8, **board)
    assert small_tokens == TokenTransformerConfig(vocabulary_size=5, mask_id=0, rows=4, columns=4, box_size=2)
    plan = {"generate_schedule": (30, 0.9), "refine_schedule": (30, 0.9)}
    assert even == PatchTransformerConfig(channels=3, image_size=32, patch_size=4, pixel_width=16, **size, **plan)
    plan = {"generate_schedule": (10, 0.9), "refine_schedule": (10, 0.9)}
    plan |= {"output": "clean"}
    assert polygons == PatchTransformerConfig(channels=3, image_size=128, patch_size=8, **size, **plan)
    plan |= {"width": 128, "depth": 6, "num_heads": 8}
    assert few == PatchTransformerConfig(channels=3, image_size=96, patch_size=12, **plan)


def test_a_task_may_bring_its_own_network():
    own = PatchTransformerConfig(channels=3, image_size=32, patch_size=4, width=16, depth=1, num_heads=1)
    task = EvenPixels()
    task.config = own
    assert config_of(task) is own
    assert config_of(SimpleNamespace(name="mine", config=own)) is own


def test_a_task_of_ones_own_needs_a_network():
    with pytest.raises(ValueError, match=r"^task mine: must have a `config`"):
        config_of(SimpleNamespace(name="mine"))


def test_models_of_large_boards_and_polygons_begin_with_other_heads():
    for task in (DigitSudoku(4), DigitSudoku(9), EvenPixels(), CountingPolygons(), TokenSudoku(4), TokenSudoku(9)):
        torch.manual_seed(0)
        model = make_network(config_of(task))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        initialise(task, model)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        heads = {f"layers.{i}.qkv.weight" for i in range(config_of(task).depth)}
        tables = {"position.rows", "position.columns", *({"position.boxes"} if "9x9" in task.name else ())}
        assert changed == (heads | tables if "9x9" in task.name or "polygons" in task.name else set())


def test_a_task_may_begin_with_weights_of_its_own():
    model = PatchTransformer(config_of(EvenPixels()))
    initialise(SimpleNamespace(initialise=lambda model: torch.nn.init.zeros_(model.patch_in.weight)), model)
    assert not model.patch_in.weight.any()


SMALL = PatchTransformerConfig(channels=3, image_size=32, patch_size=4, width=16, depth=1, num_heads=1)


def test_init_gives_a_new_model_its_weights_in_place_of_the_tasks():
    source, model = PatchTransformer(SMALL), PatchTransformer(SMALL)
    initialise(SimpleNamespace(initialise=lambda model: pytest.fail("not asked")), model, source)
    weights = zip(source.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in weights)


def test_init_of_another_kind_or_configuration_or_with_bad_weights_is_refused():
    model, other = PatchTransformer(SMALL), PatchTransformer(dataclasses.replace(SMALL, depth=2, mlp_ratio=2))
    with pytest.raises(ValueError, match=r"^init must be a PatchTransformer, got Linear"):
        initialise(EvenPixels(), model, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^init must be .* got depth 2 \(now 1\), mlp_ratio 2 \(now 4\)$"):
        initialise(EvenPixels(), model, other)
    broken = PatchTransformer(SMALL)
    broken.patch_in.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^init must have finite weights"):
        initialise(EvenPixels(), model, broken)
