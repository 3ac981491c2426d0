"""Packed weights on a CPU: the numbers of the plain layers, and those layers themselves where nothing is packed."""

from types import SimpleNamespace

import pytest
import torch
from small_models import TINY, randomise
from support.counts import count
from torch import nn
from torch.nn import functional as F

import ipr_fast
from ipr_fast import ActivePatches, Schedule, random_patches
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig, packed
from ipr_fast.models.packed import MIN_ROWS, PackedWeights

ROUNDING = 2.0**-24  # of one float32 operation
# Maps of 12, 6, 3 pixels, and of 14, 7, 4: of the latter one is doubled to its size, and one to a pixel less.
EVEN = SRMUNetConfig(3, 12, 4, (32, 64, 32), (False, True, True), 1, 32, 32, 16)
ODD = SRMUNetConfig(1, 14, 7, (32, 64, 32), (False, True, True), 1, 32, 32, 16)
needs_packing = pytest.mark.skipif(not packed._can_be_packed(nn.Linear(1, 1)), reason="a torch without oneDNN")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def weights_of(model, upsampling=()):
    made = PackedWeights()
    made.pack(model, upsampling)
    return made


def runs_packed(work):
    """Whether an operator with packed weights was called."""
    return any(name.startswith("mkldnn::") for name in count(work, "cpu").by_name)


def exact(layer, x, plus=None):
    """The layer's result in float64, and what every sum of its terms may be off in float32, in whatever order."""
    wide, size, bias = layer.weight.double(), layer.weight.double().abs(), layer.bias
    if isinstance(layer, nn.Linear):
        value, largest = (F.linear(of.double(), weight) for of, weight in ((x, wide), (x.abs(), size)))
        bias = torch.zeros(1) if bias is None else bias
    else:
        shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
        value, largest = (F.conv2d(of.double(), w, None, *shape) for of, w in ((x, wide), (x.abs(), size)))
        bias = torch.zeros(1) if bias is None else bias[:, None, None]
    plus = torch.zeros(1) if plus is None else plus
    value, largest = value + bias + plus, largest + bias.abs() + plus.abs()
    return value, (layer.weight[0].numel() + 2) * ROUNDING * largest


def assert_within(found, expected, allowed):
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= allowed).all()


# --------------------------------------------------------------------------------------------------------- layers

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": 5, "padding": 2, "groups": 2, "dilation": 2},
]


@needs_packing
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(12, 12), (9, 13)])
@pytest.mark.parametrize("ending", ["none", "plus", "onto"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolution(options, size, ending, channels_last, generator):
    conv = randomise(nn.Conv2d(6, 10, **options), seed=0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 6, *size, generator=generator).contiguous(memory_format=layout)
    map_ = torch.randn(conv(x).shape, generator=generator).contiguous(memory_format=layout)
    weights, kept = weights_of(conv), (x.clone(), map_.clone())
    given = {} if ending == "none" else {ending: map_}
    found = packed.convolution(conv, x, weights, **given)
    assert torch.equal(x, kept[0])
    assert torch.equal(map_, kept[1]) or ending == "onto"
    assert_within(found, *exact(conv, x, None if ending == "none" else kept[1]))
    given = {} if ending == "none" else {ending: kept[1]}
    assert runs_packed(lambda: packed.convolution(conv, x, weights, **given))
    assert not runs_packed(lambda: packed.convolution(conv, x, **given))


@needs_packing
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
def test_pointwise(make, size, generator):
    conv = randomise(make(6, 10, 1), seed=0)
    x = torch.randn(3, 6, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    weights, layer = weights_of(conv), nn.Linear(6, 10)
    layer.weight.copy_(conv.weight.view(10, 6))
    layer.bias.copy_(conv.bias)
    value, allowed = (each.permute(0, 3, 1, 2) for each in exact(layer, x.permute(0, 2, 3, 1)))
    for given in (weights, None):
        assert_within(packed.pointwise(conv, x, given), value, allowed)
    assert runs_packed(lambda: packed.pointwise(conv, x, weights))


@needs_packing
@pytest.mark.parametrize("shape", [(MIN_ROWS,), (2, MIN_ROWS), (MIN_ROWS - 1,), (1, 1)])
@pytest.mark.parametrize("gelu", [True, False])
def test_linear(shape, gelu, generator):
    layer = randomise(nn.Linear(24, 40), seed=0)
    x, weights = 3 * torch.randn(*shape, 24, generator=generator), weights_of(layer)
    value, allowed = exact(layer, x)
    if gelu:  # it rises by no more than 1.13, and ends in a sum with 1 that may be off by a few roundings
        value, allowed = F.gelu(value, approximate="tanh"), 1.13 * allowed + 8 * ROUNDING * value.abs()
    for given in (weights, None):
        assert_within(packed.linear(layer, x, given, gelu=gelu), value, allowed)
    enough = x.numel() // 24 >= MIN_ROWS
    assert runs_packed(lambda: packed.linear(layer, x, weights, gelu=gelu)) is enough


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("less", [(0, 0), (1, 1), (0, 1)])
def test_upsampled_convolution(size, less, generator):
    """Its taps are sums of up to four; a size that is not twice the map's takes the plain path."""
    conv = randomise(nn.Conv2d(6, 10, 3, padding=1), seed=0)
    x = torch.randn(2, 6, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    target = torch.Size(2 * own - missing for own, missing in zip(size, less, strict=True))
    expected = exact(conv, F.interpolate(x, size=target, mode="nearest"))
    weights = weights_of(conv, upsampling=[conv])
    for given in (weights, weights_of(conv), None):
        assert_within(packed.upsampled_convolution(conv, x, target, given), *expected)
    found = count(lambda: packed.upsampled_convolution(conv, x, target, weights), "cpu").by_name
    if weights.upsampling_kernel(conv) is not None:
        assert ("upsample_nearest2d" in found) == any(less)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [129, 132, 7])
def test_an_aligned_layer_has_rows_of_whole_vectors(features, bias, generator, monkeypatch):
    monkeypatch.setattr(packed, "_can_be_aligned", lambda layer: True)  # else on a GPU alone
    layer, x = randomise(nn.Linear(24, features, bias=bias), seed=0), torch.randn(2, 5, 24, generator=generator)
    weights = PackedWeights()
    weights.pack(nn.Sequential(layer), aligned=[layer])
    there = weights.aligned(layer)
    for factor in (1, -3):
        for parameter in layer.parameters():
            parameter.mul_(factor)
        weights.pack(nn.Sequential(layer), aligned=[layer])
        found = packed.linear(layer, x, weights)
        assert_within(found, *exact(layer, x))
        assert found.stride() == (5 * found.stride(1), found.stride(1), 1)
        assert found.stride(1) % packed.ALIGNMENT == 0
    assert weights.aligned(layer) is there  # graphs read it


def test_an_aligned_layer_outlives_a_hook_for_all_modules(monkeypatch):
    monkeypatch.setattr(packed, "_can_be_aligned", lambda layer: True)
    layer, weights = nn.Linear(24, 7), PackedWeights()
    weights.pack(nn.Sequential(layer), aligned=[layer])
    there = weights.aligned(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        weights.pack(nn.Sequential(layer), aligned=[layer])
        assert weights.aligned(layer) is None
    finally:
        handle.remove()
    assert weights.aligned(layer) is there


def test_no_layer_of_a_cpu_is_aligned():
    layer = nn.Linear(24, 7)
    weights = PackedWeights()
    weights.pack(nn.Sequential(layer), aligned=[layer])
    assert weights.aligned(layer) is None


def test_the_upsampling_kernel_of_ones_counts_the_taps():
    kernel = packed.upsampling_kernel(torch.ones(2, 5, 3, 3))
    assert kernel.shape == (5, 2, 4, 4)
    taps = torch.tensor([1.0, 2.0, 2.0, 1.0])
    assert torch.equal(kernel, (taps[:, None] * taps).expand(5, 2, 4, 4))


def test_empty_batches():
    conv, layer = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 6)
    weights = weights_of(nn.ModuleList([conv, layer]), upsampling=[conv])
    x = torch.zeros(0, 4, 6, 6).to(memory_format=torch.channels_last)
    assert packed.convolution(conv, x, weights).shape == x.shape
    assert packed.convolution(conv, x, weights, plus=x).shape == x.shape
    assert packed.convolution(conv, x, weights, onto=x).shape == x.shape
    assert packed.upsampled_convolution(conv, x, torch.Size((12, 12)), weights).shape == (0, 4, 12, 12)
    assert packed.linear(layer, torch.zeros(0, 4), weights, gelu=True).shape == (0, 6)


# ----------------------------------------------------------------------------------------------- what is not packed


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda layer, given, out: 2 * out)
    return layer


def hooked_before():
    layer = nn.Linear(8, 8)
    layer.register_forward_pre_hook(lambda layer, given: 2 * given[0])
    return layer


def replaced():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x, whole=layer.forward: 2 * whole(x)
    return layer


PLAIN = {
    "a subclass": lambda: Doubled(8, 8),
    "a hook": hooked,
    "a hook before": hooked_before,
    "a forward of its own": replaced,
    "a parametrization": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "float64": lambda: nn.Linear(8, 8).double(),
    "bfloat16": lambda: nn.Linear(8, 8).bfloat16(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_layers_that_are_more_than_they_look_run_as_they_are(name, generator):
    layer = PLAIN[name]()
    x = torch.randn(2 * MIN_ROWS, 8, generator=generator).to(layer.weight.dtype)
    weights = weights_of(nn.Sequential(layer))
    assert weights.weight(layer) is None
    assert torch.equal(packed.linear(layer, x, weights), layer(x))
    expected = F.gelu(layer(x), approximate="tanh")
    assert torch.equal(packed.linear(layer, x, weights, gelu=True), expected)


@torch.inference_mode()
def test_what_another_layer_returns_is_left_alone():
    """It may be kept by somebody: GELU does not overwrite it."""
    kept = torch.full((3, 8), -1.0)
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda layer, given, out: kept)
    for weights in (None, weights_of(nn.Sequential(layer))):
        assert torch.equal(
            packed.linear(layer, torch.zeros(3, 8), weights, gelu=True), F.gelu(kept, approximate="tanh")
        )
        assert (kept == -1).all()


def test_hooks_of_all_modules_and_replaced_forwards_are_heard(monkeypatch):
    layer = nn.Linear(8, 8)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: 2 * out)
    assert weights_of(nn.Sequential(layer)).weight(layer) is None
    handle.remove()
    assert weights_of(nn.Sequential(layer)).weight(layer) is not None
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert weights_of(nn.Sequential(layer)).weight(layer) is None


@pytest.mark.parametrize("options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}], ids=str)
def test_other_paddings_run_as_they_are(options, generator):
    conv = nn.Conv2d(4, 4, 3, **options)
    x, map_ = torch.randn(2, 2, 4, 6, 7, generator=generator)
    weights = weights_of(conv)
    assert weights.weight(conv) is None
    assert torch.equal(packed.convolution(conv, x, weights), conv(x))
    assert torch.equal(packed.convolution(conv, x, weights, plus=map_), conv(x) + map_)
    assert torch.equal(packed.convolution(conv, x, weights, onto=map_), conv(x) + map_)


def test_under_autocast_the_plain_layers_run(generator):
    layer, conv = nn.Linear(4, 8), nn.Conv2d(4, 4, 3, padding=1)
    weights = weights_of(nn.ModuleList([layer, conv]), upsampling=[conv])
    rows, x = torch.randn(2 * MIN_ROWS, 4, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed.linear(layer, rows, weights), layer(rows))
        assert torch.equal(packed.convolution(conv, x, weights), conv(x))
        found = packed.upsampled_convolution(conv, x, torch.Size((12, 12)), weights)
        assert torch.equal(found, conv(F.interpolate(x, size=(12, 12), mode="nearest")))
        assert found.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------- models


def transformer():
    return randomise(PatchTransformer(TINY), seed=0)


def unet(config):
    torch.manual_seed(0)
    return SRMUNet(config).eval().requires_grad_(False)


LEVELS = torch.linspace(0, 1, 11)
MODELS = {"transformer": transformer, "unet": lambda: unet(EVEN), "odd unet": lambda: unet(ODD)}


def with_a_table_and_without(model, generator, table):
    """The predictions of occupied slots, enough of them for packed layers."""
    patches = torch.randn(40, model.grid.num_patches, model.grid.patch_numel, generator=generator)
    mask = torch.rand(patches.shape[:2], generator=generator) < 0.4
    mask[0], mask[1] = False, True
    active = ActivePatches.from_mask(mask)
    levels, found = LEVELS[torch.randint(0, len(LEVELS), active.index.shape, generator=generator)], []
    for given in ({"table": table}, {}):
        prepared = {"context": model.prepare(patches, active, **given)} if hasattr(model, "prepare") else {}
        found.append(model(patches, levels, active, **prepared, **given))
    return [[field[active.occupied] for field in fields] for fields in found]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):  # float32 through a forward pass, summed in another order
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


@needs_packing
@pytest.mark.parametrize("name", MODELS)
def test_models_with_a_table_give_the_same_as_without(name, generator):
    model = MODELS[name]()
    table = model.tabulate(LEVELS)
    assert_same(*with_a_table_and_without(model, generator, table))
    assert runs_packed(lambda: with_a_table_and_without(model, generator, table))


@pytest.mark.parametrize("missing", ["operators", "oneDNN"])
@pytest.mark.parametrize("name", MODELS)
def test_a_build_without_the_operators_gives_the_same(name, missing, generator, monkeypatch):
    if missing == "operators":
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = MODELS[name]()
    table = model.tabulate(LEVELS)
    assert all(table.packed.weight(layer) is None for layer in model.modules())
    assert_same(*with_a_table_and_without(model, generator, table))


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_changed_weights_are_used_once_they_are_packed_again(name, generator):
    model = MODELS[name]()
    table = model.tabulate(LEVELS)
    for parameter in model.parameters():
        parameter.mul_(1.2)
    assert model.tabulate(LEVELS, out=table) is table
    assert_same(*with_a_table_and_without(model, generator, table))


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_weights_that_a_callback_changes_are_the_ones_used(name, generator):
    x = torch.randn(24, *MODELS[name]().grid.sample_shape, generator=generator).clamp(-1, 1)
    results = []
    for backend in ("torch", "reference"):
        model = MODELS[name]()

        def callback(iteration, x, model=model):
            for parameter in model.parameters():
                parameter.data.mul_(1.3 if iteration == 1 else 1.0)

        options = {"model": model, "schedule": Schedule(2, 0.8), "callback": callback, "backend": backend}
        results.append(ipr_fast.refine_batch(x, random_patches(0.5), 2, **options))
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)
