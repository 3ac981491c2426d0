import pytest
import torch
from norms import assert_near, types

from ipr_fast.kernels import modulated_norm as file
from ipr_fast.kernels.launch import runs_kernel


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


def test_no_tokens(device):
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
