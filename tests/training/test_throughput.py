import math
from dataclasses import replace

import pytest
import torch
from small_models import TINY, TINY_TOKENS

from ipr_fast.models import PatchTransformer, PatchTransformerConfig, TokenTransformer
from ipr_fast.training import throughput
from ipr_fast.training.throughput import product_rate, training_flops

COLOURED = PatchTransformerConfig(3, 32, 4, width=48, depth=3, num_heads=4, mlp_ratio=3, level_features=32)


def by_hand(config, patches):
    """Two operations for each multiplication; a product's gradients are two more, or one where its input has none."""
    n, p = patches
    width, features = config.width, config.level_features
    without_input_gradient = p * width + features * width  # of the patches, and of the levels' features
    read_out = width * (2 * p + 1)
    if config.pixel_width is not None:  # the pixels' features; the network's weights, its two products
        hidden, channels = config.pixel_width, config.channels
        without_input_gradient += 2 * hidden * p
        read_out = 2 * hidden * width + width * ((hidden + 1) * 3 * channels + hidden + 1) + 3 * hidden * p
    with_both = width * width + 6 * width * width + 2 * width * width + read_out  # levels, scales
    layer = width * width * (3 + 1 + 2 * config.mlp_ratio) + 2 * n * width  # the latter is attention
    return 2 * n * (2 * without_input_gradient + 3 * (with_both + config.depth * layer))


@pytest.mark.parametrize("config", [TINY, COLOURED, replace(COLOURED, pixel_width=7)])
def test_operations_of_training_equal_a_count_by_hand(config):
    model = PatchTransformer(config)
    patches = (model.grid.num_patches, model.grid.patch_numel)
    assert training_flops(model) == by_hand(config, patches)


def test_operations_of_training_on_tokens_equal_a_count_by_hand():
    """Embeddings multiply nothing; every product has the gradients of both factors, but for the conditions' own."""
    n, width, size = TINY_TOKENS.length, TINY_TOKENS.width, TINY_TOKENS.vocabulary_size
    layer = width * width * (3 + 1 + 2 * TINY_TOKENS.mlp_ratio) + 2 * n * width
    products = 6 * width * width + 2 * width * width + size * width + TINY_TOKENS.depth * layer
    assert training_flops(TokenTransformer(TINY_TOKENS)) == 2 * n * 3 * products


@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_the_model_alone(training):
    model = PatchTransformer(TINY).train(training)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    training_flops(model)
    assert model.training is training
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_products_is_a_positive_number(dtype, monkeypatch):
    monkeypatch.setitem(throughput.SIDE, "cpu", 128)
    rate = product_rate(torch.device("cpu"), dtype)
    assert rate > 0
    assert math.isfinite(rate)


def test_the_rate_is_that_of_the_fastest_round(monkeypatch):
    """The first product is not counted: it may have to prepare something."""
    monkeypatch.setitem(throughput.SIDE, "cpu", 8)
    took = iter([0.001, 3.0, 2.0, 4.0, 2.5, 5.0])
    monkeypatch.setattr(throughput, "_timed", lambda a, b: next(took))
    assert product_rate(torch.device("cpu"), torch.float32) == 2 * 8**3 / 2.0
    assert next(took, None) is None
