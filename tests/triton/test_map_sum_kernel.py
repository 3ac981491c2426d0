import pytest
import torch
from norms import types

from ipr_fast.kernels import map_sum as file


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (32, 8, 8), (96, 5, 7), (130, 9, 3)])
@pytest.mark.parametrize(("with_bias", "with_map"), [(True, True), (True, False), (False, True), (False, False)])
def test_map_sum(channels, height, width, with_bias, with_map, device, generator):
    for dtype in types(device):
        h, g = torch.randn(2, 3, channels, height, width, generator=generator).to(device, dtype)
        h, g = (x.contiguous(memory_format=torch.channels_last) for x in (h, g))
        bias = torch.randn(channels, generator=generator).to(device) if with_bias else None
        g, kept = (g, g.clone()) if with_map else (None, None)
        expected = file._map_sum(h.clone(), bias, g)
        found = file.map_sum(h, bias, g)
        assert found is h
        assert torch.equal(found, expected)  # the same sums in the same order
        assert g is None or torch.equal(g, kept)


def test_an_empty_map(device):
    h = torch.zeros(0, 32, 4, 4, device=device).to(memory_format=torch.channels_last)
    assert file.map_sum(h, torch.zeros(32, device=device), h).shape == h.shape


def test_maps_of_another_layout_are_refused(device):
    h = torch.zeros(2, 32, 4, 4, device=device)
    with pytest.raises(ValueError, match="h must be channels-last, got strides"):
        file.map_sum(h, torch.zeros(32, device=device))
