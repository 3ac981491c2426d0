import pytest
import torch

from ipr_fast.kernels import modulated_norm as file
from ipr_fast.kernels.launch import runs_kernel


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def assert_near(found, expected, dtype, terms):
    """Values of order ten through some thirty float32 roundings and a sum of `terms`, then one rounding to dtype."""
    exact = 10 * (30 + terms**0.5) * 2**-24
    last = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=exact + 1e-3 * last, rtol=last)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (3, 4, 96), (2, 5, 33), (1, 3, 1000), (2, 81, 32)])
@pytest.mark.parametrize("slices", [True, False])
def test_layer_norm(batch, tokens, width, slices, device, generator):
    for dtype in types(device):
        h = (3 * torch.randn(batch, tokens, width, generator=generator) + 2).to(device, dtype)
        both = torch.randn(batch, tokens, 6 * width, generator=generator).to(device, dtype)
        scale, shift, *_ = both.chunk(6, dim=-1)
        if not slices:
            scale, shift = scale.contiguous(), shift.transpose(0, 1).contiguous().transpose(0, 1)
        found = file.modulated_layer_norm(h, scale, shift, eps=1e-6)
        expected = file._modulated_layer_norm(h.float(), scale.float(), shift.float(), 1e-6)
        assert_near(found, expected, dtype, width)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (3, 4, 96), (2, 5, 33), (1, 3, 1000), (2, 81, 32)])
@pytest.mark.parametrize("slices", [True, False])
def test_layer_norm_with_tables(batch, tokens, width, slices, device, generator):
    for dtype in types(device):
        h = (3 * torch.randn(batch, tokens, width, generator=generator) + 2).to(device, dtype)
        scale, shift, *_ = torch.randn(7, 6 * width, generator=generator).to(device, dtype).chunk(6, dim=-1)
        row = torch.randint(0, 7, (batch, tokens), generator=generator).to(device)
        if not slices:  # rows in another order in memory than they are read in
            scale, shift, row = scale.contiguous(), shift.t().contiguous().t(), row.t().contiguous().t()
        found = file.modulated_layer_norm(h, scale, shift, eps=1e-6, row=row)
        expected = file._modulated_layer_norm(h.float(), scale[row].float(), shift[row].float(), 1e-6)
        assert_near(found, expected, dtype, width)
        twin = file._modulated_layer_norm(h.float(), scale.float(), shift.float(), 1e-6, row)
        assert torch.equal(twin, expected)


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


def test_a_mean_far_from_zero_costs_no_digits(device, generator):
    """Where the mean of the squares less the square of the mean would leave three digits of seven."""
    h = (100 + torch.randn(2, 64, 32, 32, generator=generator)).to(device)
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    found = file.group_norm(h, weight, bias, groups=32, eps=1e-5)
    expected = file._group_norm(h.double(), weight.double(), bias.double(), 32, 1e-5, None, None)
    # The map's own numbers are rounded to 2**-18, the statistics add no more than a few of those.
    torch.testing.assert_close(found.double(), expected, atol=8 * 2**-18, rtol=0)


def test_empty_maps_and_no_tokens(device):
    h = torch.zeros(0, 32, 4, 4, device=device)
    ones = torch.ones(32, device=device)
    assert file.group_norm(h, ones, ones, groups=32, eps=1e-5).shape == h.shape
    for shape in ((0, 3, 8), (2, 0, 8)):
        tokens = torch.zeros(shape, device=device)
        assert file.modulated_layer_norm(tokens, tokens, tokens, eps=1e-6).shape == shape
        table, row = torch.zeros(7, 8, device=device), torch.zeros(shape[:2], dtype=torch.int64, device=device)
        assert file.modulated_layer_norm(tokens, table, table, eps=1e-6, row=row).shape == shape


def test_autograd_takes_the_twin(device, generator):
    h = torch.randn(2, 3, 8, generator=generator).to(device).requires_grad_(True)
    assert not runs_kernel(file.layer_norm_kernel, h)
    assert runs_kernel(file.layer_norm_kernel, h.detach())
    assert file.modulated_layer_norm(h.detach(), h, h, eps=1e-6).requires_grad
    file.modulated_layer_norm(h, h, h, eps=1e-6).sum().backward()
    assert h.grad.isfinite().all()
