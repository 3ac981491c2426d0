from dataclasses import replace

import pytest
import torch
from small_models import TINY

from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.models.transformer_layers import Layer
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.training.configs import config_of
from ipr_fast.training.initialise import bias_heads_to_lines, bias_heads_to_neighbours

CELL = torch.arange(81)
ROW, COLUMN = CELL // 9, CELL % 9
IN_LINE = torch.stack([of[:, None] == of for of in (ROW, COLUMN, ROW // 3 * 3 + COLUMN // 3)])  # (3, 81, 81)


def new_model(config, seed):
    torch.manual_seed(seed)
    model = PatchTransformer(config)
    bias_heads_to_lines(model)
    return model


def heads_of(layer):
    """Weights of queries and keys, (heads, size, width)."""
    width = layer.qkv.in_features
    return layer.qkv.weight.detach().view(3, layer.num_heads, -1, width)[:2]


def attention_of(model, level, monkeypatch):
    """The attention of each head of each layer, (depth, heads, N, N), in noise at a level."""
    found, attend, count = [], Layer.attend, model.grid.num_patches

    def watched(layer, q, keys_values, may_attend):
        keys = keys_values.chunk(2, -1)[0]
        q_heads, k_heads = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, keys))
        found.append((q_heads @ k_heads.transpose(2, 3) / q_heads.shape[-1] ** 0.5).softmax(-1).mean(0))
        return attend(layer, q, keys_values, may_attend)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, count, model.grid.patch_numel, generator=generator)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Layer, "attend", watched)
        model.predict(noise, torch.full((2, count), level), torch.full((2, count), level > 0))
    return torch.stack(found)


def share_in_line(model, level, monkeypatch):
    """(depth, heads): how much of a head's attention lies on the row, column or box that is its turn to see."""
    weights = attention_of(model, level, monkeypatch)
    return (weights * IN_LINE[torch.arange(weights.shape[1]) % 3]).sum(-1).mean(-1)


@pytest.fixture(scope="module")
def config():
    return config_of(DigitSudoku(9))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_heads_of_every_layer_look_along_rows_columns_and_boxes_in_turn(config, level, monkeypatch):
    """More than nine tenths for most of them; without looking, a line's nine cells of 81 get a ninth."""
    shares = share_in_line(new_model(config, seed=0), level, monkeypatch)
    assert shares.shape == (config.depth, config.num_heads)
    assert shares.min() > 0.85
    assert shares.max() < 1


def test_heads_without_bias_do_not_look_along_lines(config, monkeypatch):
    """A ninth, to a ninth of it: a new head's products deviate by a third, and a line has nine."""
    torch.manual_seed(0)
    by_chance = share_in_line(PatchTransformer(config), 1.0, monkeypatch).mean()
    assert by_chance == pytest.approx(1 / 9, abs=1 / 81)


def test_embeddings_are_orthogonal_and_of_the_norm_that_they_have_anyway(config):
    """Orthogonal to what a decomposition in float32 leaves: some of its epsilons of 1.2e-7, of 64."""
    position = new_model(config, seed=0).position
    tables = torch.cat([position.rows, position.columns, position.boxes]).detach()
    assert tables.shape == (27, config.width)
    assert torch.allclose(tables @ tables.T, 0.25 * config.width * torch.eye(27), atol=64 * 1e-5)
    torch.manual_seed(0)
    anyway = PatchTransformer(config).position.rows.detach().square().sum(1).mean()  # 9 * 256 squares of 0.25 each
    assert anyway.item() == pytest.approx(0.25 * config.width, rel=5 * (2 / (9 * config.width)) ** 0.5)


def test_a_heads_first_channels_are_the_coordinates_of_its_line(config):
    model = new_model(config, seed=0)
    tables = (model.position.rows, model.position.columns, model.position.boxes)
    for layer in model.layers:
        for head in range(config.num_heads):
            direction = tables[head % 3].detach() / (0.5 * config.width**0.5)
            for weight in heads_of(layer)[:, head, :9]:
                assert torch.allclose(weight, direction, atol=1e-6)


def test_nothing_else_changes(config):
    torch.manual_seed(0)
    before, after = PatchTransformer(config), new_model(config, seed=0)
    changed = {
        name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])
    }
    heads = {f"layers.{i}.qkv.weight" for i in range(config.depth)}
    assert changed == heads | {"position.rows", "position.columns", "position.boxes"}
    for old, new in zip(before.layers, after.layers, strict=True):
        assert torch.equal(heads_of(old)[:, :, 9:], heads_of(new)[:, :, 9:])
        assert torch.equal(old.qkv.weight[2 * config.width :], new.qkv.weight[2 * config.width :])  # the values
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_the_global_generator_is_followed():
    a, b, c = (new_model(TINY, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["position.rows"], c["position.rows"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"box_size": 0}, r"model must have position embeddings of boxes \(box_size\), got none"),
        ({"width": 24, "num_heads": 8}, "at least 4 channels a head and 12 in all, got width 24 in 8 heads"),
        ({"width": 8, "num_heads": 1}, "at least 4 channels a head and 12 in all, got width 8 in 1 heads"),
    ],
)
def test_models_without_lines_or_room_are_refused_and_left_alone(changes, said):
    model = PatchTransformer(replace(TINY, **changes))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        bias_heads_to_lines(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_narrowest_models_will_do():
    for changes in ({"width": 12, "num_heads": 1}, {"width": 12, "num_heads": 3}):
        model = new_model(replace(TINY, **changes), seed=0)
        assert model.position.rows.detach().square().sum(1).tolist() == pytest.approx([3.0] * 4, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ neighbours

GRIDS = {  # three waves at least for each dimension
    "images": ((16, 16), PatchTransformerConfig(3, 128, 8, width=128, depth=2, num_heads=8)),
    "wide images": ((6, 12), PatchTransformerConfig(1, (12, 36), (2, 3), width=128, depth=2, num_heads=8)),
    "sequences": ((24,), PatchTransformerConfig(2, (96,), 4, width=128, depth=2, num_heads=8)),
    "video": ((5, 6, 7), PatchTransformerConfig(1, (5, 12, 14), (1, 2, 2), width=200, depth=2, num_heads=10)),
}


def looking_at_neighbours(config, seed=0):
    torch.manual_seed(seed)
    model = PatchTransformer(config)
    bias_heads_to_neighbours(model)
    return model


@pytest.mark.parametrize("name", GRIDS)
def test_heads_look_back_and_on_along_each_dimension_and_at_the_surroundings(name, monkeypatch):
    shape, config = GRIDS[name]
    weights = attention_of(looking_at_neighbours(config), 0.5, monkeypatch)
    place = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape))
    steps = [(axis, step) for axis in range(len(shape)) for step in (-1, 1)]
    for head in range(config.num_heads):
        turn = head % (len(steps) + 4)
        attention = weights[:, head]
        near = ((place[:, None] - place).abs().amax(-1) <= 1).float()
        if turn >= len(steps) + 2:  # left as it was: a neighbour gets what any place gets
            assert (attention * near).sum(-1).mean() < 2 * near.mean()
            continue
        assert (attention * near).sum(-1).mean() > 4 * near.mean()
        if turn >= len(steps):
            continue
        axis, step = steps[turn]
        sought = place.clone()
        sought[:, axis] += step
        inside = (sought[:, axis] >= 0) & (sought[:, axis] < shape[axis])
        expected = (place[None] == sought[:, None]).all(-1).float().argmax(1)
        assert (attention.argmax(-1) == expected)[:, inside].float().mean() > 0.9


def test_only_places_and_the_heads_that_look_change():
    config = GRIDS["images"][1]
    torch.manual_seed(0)
    before, after = PatchTransformer(config), looking_at_neighbours(config)
    changed = {
        name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])
    }
    assert changed == {f"layers.{i}.qkv.weight" for i in range(2)} | {"position.rows", "position.columns"}
    for old, new in zip(before.layers, after.layers, strict=True):
        assert torch.equal(heads_of(old)[:, 6:], heads_of(new)[:, 6:])
        assert torch.equal(old.qkv.weight[256:], new.qkv.weight[256:])  # the values
    for table in (after.position.rows, after.position.columns):
        assert table.detach().square().sum(1).tolist() == pytest.approx([0.25 * 128] * 16, rel=1e-4)
    again, other = looking_at_neighbours(config).state_dict(), looking_at_neighbours(config, 1).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in after.state_dict().items())
    assert not torch.equal(other["position.rows"], again["position.rows"])


def test_models_too_narrow_for_waves_are_refused_and_left_alone():
    model = PatchTransformer(replace(TINY, width=24, num_heads=8))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least 4 channels a head, got width 24 in 8 heads"):
        bias_heads_to_neighbours(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    bias_heads_to_neighbours(PatchTransformer(replace(TINY, width=4, num_heads=1, box_size=0)))
