"""Layers whose float32 weights are split in two for a GPU: see ipr_fast/models/packed.py."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ipr_fast.kernels import linear as split_linear
from ipr_fast.models import packed
from ipr_fast.models.packed import MIN_SPLIT_ROWS, PackedWeights, linear


@pytest.fixture
def layer(device, generator):
    layer = nn.Linear(20, 9).to(device).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.fixture
def calls(monkeypatch):
    """Calls of the kernel's launcher."""
    made, real = [], split_linear.linear

    def counted(x, *arguments, **options):
        made.append(x)
        return real(x, *arguments, **options)

    monkeypatch.setattr(split_linear, "linear", counted)
    return made


def packed_of(layer):
    weights = PackedWeights()
    weights.pack(nn.Sequential(layer), split=(layer,), aligned=(layer,))
    return weights


def assert_near(found, expected):
    """Sums of 20 products of magnitude below 16, and GELU."""
    torch.testing.assert_close(found, expected, atol=16 * 32 * 2**-24, rtol=0)


@pytest.mark.parametrize("gelu", [False, True])
def test_many_rows_take_the_kernel(gelu, layer, calls, device, generator):
    weights, x = packed_of(layer), torch.randn(2, MIN_SPLIT_ROWS, 20, generator=generator).to(device)
    found, expected = linear(layer, x, weights, gelu=gelu), layer(x)
    assert_near(found, F.gelu(expected, approximate="tanh") if gelu else expected)
    assert len(calls) == 1
    linear(layer, x[0, 1:], weights)
    linear(layer, x)
    assert len(calls) == 1


def test_packing_again_overwrites_what_graphs_read(layer, calls, device, generator):
    weights, x = packed_of(layer), torch.randn(MIN_SPLIT_ROWS, 20, generator=generator).to(device)
    parts = weights.parts(layer, x)
    layer.weight.mul_(2)
    weights.pack(nn.Sequential(layer), split=(layer,), aligned=(layer,))
    assert weights.parts(layer, x) is parts
    assert torch.equal(parts.sum(0), layer.weight)
    assert any(each is parts for each in weights.on_gpu)


def test_what_graphs_read_outlives_a_hook_for_all_modules(layer, device):
    weights, x = packed_of(layer), torch.zeros(MIN_SPLIT_ROWS, 20, device=device)
    parts = weights.parts(layer, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        layer.weight.mul_(2)
        weights.pack(nn.Sequential(layer), split=(layer,), aligned=(layer,))
        assert weights.parts(layer, x) is None
    finally:
        handle.remove()
    assert weights.parts(layer, x) is parts
    assert torch.equal(parts.sum(0), layer.weight)


def test_a_weight_of_another_shape_gets_parts_of_its_own(layer, device):
    weights, x = packed_of(layer), torch.zeros(MIN_SPLIT_ROWS, 20, device=device)
    layer.weight.data = layer.weight[:1].clone()
    weights.pack(nn.Sequential(layer), split=(layer,), aligned=(layer,))
    assert weights.parts(layer, x).shape == (2, 1, 20)


def test_products_in_tf32_are_torchs(layer, device, monkeypatch):
    weights, x = packed_of(layer), torch.zeros(MIN_SPLIT_ROWS, 20, device=device)
    monkeypatch.setattr(split_linear, "takes_tf32", lambda: True)
    assert weights.parts(layer, x) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's autocast")
def test_under_autocast_products_are_torchs(layer, device):
    weights, x = packed_of(layer), torch.zeros(MIN_SPLIT_ROWS, 20, device=device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert weights.parts(layer, x) is None


@pytest.mark.parametrize("change", ["half", "hook"])
def test_other_layers_are_not_split(change, layer, device):
    if change == "half":
        layer.half()
    else:
        layer.register_forward_hook(lambda *_: None)
    assert packed_of(layer).parts(layer, torch.zeros(MIN_SPLIT_ROWS, 20, device=device)) is None


def test_a_gpus_rows_are_aligned(layer, calls, device, monkeypatch):
    monkeypatch.setattr(packed, "_can_be_aligned", lambda layer: True)
    out = linear(layer, torch.zeros(MIN_SPLIT_ROWS, 20, device=device), packed_of(layer))
    assert out.stride() == (16, 1)
