import pytest
import torch
from norms import assert_near, types

from ipr_fast.kernels import group_norm as file

MAPS = [
    (1, 32, 1, 1, None),
    (2, 64, 8, 8, (2, 2)),
    (3, 32, 5, 7, None),
    (2, 96, 6, 6, (3, 3)),
    (1, 192, 9, 9, (9, 9)),
    (2, 32, 40, 40, (4, 4)),
    (1, 160, 21, 21, (3, 3)),
]


@pytest.mark.parametrize(("batch", "channels", "height", "width", "grid"), MAPS)
@pytest.mark.parametrize(("channels_last", "silu"), [(True, True), (False, True), (True, False)])
def test_group_norm(batch, channels, height, width, grid, channels_last, silu, device, generator):
    for dtype in types(device):
        h = (2 * torch.randn(batch, channels, height, width, generator=generator) + 5).to(device, dtype)
        h = h.to(memory_format=torch.channels_last) if channels_last else h
        weight, bias = torch.randn(2, channels, generator=generator).to(device, dtype)
        rows = index = None
        if grid is not None:
            rows = torch.randn(11, channels, generator=generator).to(device, dtype)
            index = torch.randint(0, 11, (batch, *grid), generator=generator).to(device)
        options = {"groups": 32, "eps": 1e-5, "silu": silu}
        before = h.clone()
        found = file.group_norm(h, weight, bias, rows=rows, index=index, **options)
        assert torch.equal(h, before)
        wide = [None if x is None else x.double() for x in (rows,)]
        expected = file._group_norm(h.double(), weight.double(), bias.double(), 32, 1e-5, wide[0], index, silu)
        if channels == 32 and height == 1:  # a group of one number: x - x, rounded, over sqrt(eps)
            torch.testing.assert_close(found.double(), expected, atol=2e-2 if dtype != torch.float32 else 1e-3, rtol=0)
            continue
        assert_near(found, expected, dtype, height * width * channels // 32)
        assert found.is_contiguous(memory_format=torch.channels_last)


TWO = [
    (2, 64, 32, 8, 8),
    (1, 192, 128, 9, 9),
    (2, 96, 7, 6, 5),  # a group has channels of both maps
    (1, 160, 64, 20, 17),
]


@pytest.mark.parametrize(("batch", "channels", "split", "height", "width"), TWO)
@pytest.mark.parametrize("whole", [True, False])
def test_two_maps_and_a_shift(batch, channels, split, height, width, whole, device, generator, monkeypatch):
    if not whole:
        monkeypatch.setattr(file, "WHOLE", 0)
    for dtype in types(device):
        h = (2 * torch.randn(batch, channels, height, width, generator=generator) + 5).to(device, dtype)
        maps = [part.contiguous(memory_format=torch.channels_last) for part in (h[:, :split], h[:, split:])]
        weight, bias = torch.randn(2, channels, generator=generator).to(device, dtype)
        shift = torch.randn(channels, generator=generator).to(device)
        found = file.group_norm(maps[0], weight, bias, groups=32, eps=1e-5, other=maps[1], shift=shift)
        wide = (x.double() for x in (h, weight, bias))
        expected = file._group_norm(*wide, 32, 1e-5, shift=shift.double())
        assert_near(found, expected, dtype, height * width * channels // 32)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ahead", [0, 2**12, 2**30])
@pytest.mark.parametrize(("tile", "channels"), [(256, 64), (512, 192)])
def test_large_slabs_take_turns(ahead, tile, channels, device, generator, monkeypatch):
    """A result that comes before its statistics would wait for ever under the interpreter, which runs one at a time."""
    for name, value in {"WHOLE": 0, "AHEAD": ahead, "TILE": tile}.items():
        monkeypatch.setattr(file, name, value)
    h = torch.randn(2, channels, 6, 7, generator=generator).to(device, memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=generator).to(device)
    rows = torch.randn(11, channels, generator=generator).to(device)
    index = torch.randint(0, 11, (2, 3, 7), generator=generator).to(device)
    found = file.group_norm(h, weight, bias, groups=32, eps=1e-5, rows=rows, index=index)
    expected = file._group_norm(h.double(), weight.double(), bias.double(), 32, 1e-5, rows.double(), index)
    assert_near(found, expected, torch.float32, 6 * 7 * channels // 32)


def test_a_mean_far_from_zero_costs_no_digits(device, generator):
    """Where the mean of the squares less the square of the mean would leave three digits of seven."""
    h = (100 + torch.randn(2, 64, 32, 32, generator=generator)).to(device)
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    found = file.group_norm(h, weight, bias, groups=32, eps=1e-5)
    expected = file._group_norm(h.double(), weight.double(), bias.double(), 32, 1e-5, None, None)
    # The map's own numbers are rounded to 2**-18, the statistics add no more than a few of those.
    torch.testing.assert_close(found.double(), expected, atol=8 * 2**-18, rtol=0)


def test_an_empty_map(device):
    h, ones = torch.zeros(0, 32, 4, 4, device=device), torch.ones(32, device=device)
    assert file.group_norm(h, ones, ones, groups=32, eps=1e-5).shape == h.shape
