"""A UNet whose convolutions leave out their biases, as on a GPU: the numbers of the plain layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ipr_fast import ActivePatches
from ipr_fast.models import SRMUNet, SRMUNetConfig, deferred_bias, unet_operations
from ipr_fast.models.deferred_bias import DeferredBiases
from ipr_fast.models.unet_biases import lacking_biases
from ipr_fast.models.unet_operations import LayerInputs

# 21, 11, 6 and 3 pixels a side. Of the shortcuts' outputs one goes into a downsampling, one into an attention.
CONFIG = SRMUNetConfig(1, 21, 7, (32, 64, 32, 32), (False, False, False, True), 1, 32, 32, 16)
DEEPER = replace(CONFIG, num_blocks=2, attention=(True, False, True, False))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def unet(config, dtype=torch.float64):
    torch.manual_seed(0)
    return SRMUNet(config).eval().requires_grad_(False).to(dtype)


def raw(model, generator, biases, dtype=torch.float64):
    """The network's output, with maps that lack biases or without."""
    patches = torch.randn(2, 9, 49, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(2, 9, generator=generator) < 0.5
    active = ActivePatches.from_mask(mask)
    levels = torch.rand(2, 9, generator=generator)
    images = model.grid.to_images(patches).contiguous(memory_format=torch.channels_last)
    level_maps = model._level_maps(levels, active, None)
    return model.model(images, LayerInputs(level_maps, None, biases))


def assert_same(model, biases=None):
    """In float64, through some hundred operations."""
    expected = raw(model, torch.Generator().manual_seed(1), None)
    found = raw(model, torch.Generator().manual_seed(1), biases or deferred(model))
    torch.testing.assert_close(found, expected, atol=1e-11 * expected.abs().max().item(), rtol=0)


def deferred(model):
    biases = DeferredBiases()
    biases.update(lacking_biases(model.model))
    return biases


@pytest.mark.parametrize("config", [CONFIG, DEEPER], ids=["shallow", "deeper"])
def test_the_network_gives_the_same_without_biases_in_its_convolutions(config):
    model = unet(config)
    assert_same(model)
    for conv in model.model.modules():
        if isinstance(conv, nn.Conv1d | nn.Conv2d):
            conv.bias.normal_()
            if config is CONFIG:
                assert_same(model)
    assert_same(model)


def test_no_convolution_adds_its_bias(monkeypatch):
    model, calls = unet(DEEPER), []
    forward = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda c, x, w, b: calls.append(b) or forward(c, x, w, b))
    raw(model, torch.Generator().manual_seed(1), deferred(model))
    shortcuts = sum(name.endswith("shortcut") for name, _ in model.model.named_modules())
    assert len(calls) + shortcuts == sum(isinstance(conv, nn.Conv2d) for conv in model.model.modules())
    assert not any(bias is not None for bias in calls)


def test_norms_read_skips_where_they_are(monkeypatch):
    model, seconds = unet(CONFIG), []
    norm = unet_operations.group_norm
    monkeypatch.setattr(
        unet_operations, "group_norm", lambda *given, **more: seconds.append(more["other"]) or norm(*given, **more)
    )
    for biases in (None, deferred(model)):
        seconds.clear()
        raw(model, torch.Generator().manual_seed(1), biases)
        assert sum(skip is not None for skip in seconds) == (0 if biases is None else len(model.model.decoder.blocks))


class Other(nn.Conv2d):
    pass


def hook(model):
    model.model.bottleneck.blocks[1].register_forward_hook(lambda layer, given, out: out)


def hook_before(model):
    model.model.decoder.blocks[0][0].conv_1[0].register_forward_pre_hook(lambda layer, given: None)


def replaced(model):
    model.model.encoder.blocks[1][0].forward = model.model.encoder.blocks[1][0].forward


def subclass(model):
    model.model.decoder.out[2] = Other(32, 3, 3, padding=1)


@pytest.mark.parametrize("change", [hook, hook_before, replaced, subclass])
def test_layers_that_are_more_than_they_look_are_given_whole_maps(change):
    model = unet(CONFIG)
    assert lacking_biases(model.model)
    change(model)
    assert not lacking_biases(model.model)
    table = model.tabulate(torch.linspace(0, 1, 4))
    assert not table.biases


def test_an_update_writes_into_the_biases_that_are_there():
    model = unet(CONFIG)
    biases = deferred(model)
    norm = model.model.decoder.out.norm
    before, value = biases.of(norm), biases.of(norm).clone()
    for parameter in model.parameters():
        parameter.mul_(1.5)
    biases.update(lacking_biases(model.model))
    assert biases.of(norm) is before
    assert not torch.equal(before, value)
    assert_same(model, biases)
    biases.update({})
    assert biases.of(norm) is None
    assert not biases


def test_half_precision_stays_near():
    expected = raw(unet(CONFIG), torch.Generator().manual_seed(1), None)
    model = unet(CONFIG, torch.bfloat16)
    found = raw(model, torch.Generator().manual_seed(1), deferred(model), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_biases_are_deferred_on_a_gpu_alone(monkeypatch):
    x = torch.zeros(1)
    assert not deferred_bias.can_defer(x)
    monkeypatch.setattr(deferred_bias.map_sum, "is_launched", lambda h: True)
    assert deferred_bias.can_defer(x)
    with torch.enable_grad():
        assert not deferred_bias.can_defer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not deferred_bias.can_defer(x)
