import pytest
import torch

from ipr_fast.kernels import gated_sum as file
from ipr_fast.kernels.launch import runs_kernel

LEVELS = 7


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def assert_near(found, h, gate, x):
    """A product and a sum, each rounded to float32 or both at once, then one rounding to the type of h."""
    exact = h.double() + gate.double() * x.double()
    largest = h.double().abs() + (gate.double() * x.double()).abs()
    last = 0.0 if h.dtype == torch.float32 else torch.finfo(h.dtype).eps
    assert found.dtype == h.dtype
    assert ((found.double() - exact).abs() <= 2 * 2**-24 * largest + last * exact.abs()).all()


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (3, 4, 96), (2, 5, 33), (1, 3, 1000), (2, 81, 32)])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("slices", [True, False])
def test_gated_sum(batch, tokens, width, table, slices, device, generator):
    for dtype in types(device):
        h, x = torch.randn(2, batch, tokens, width, generator=generator).to(device, dtype)
        wide = torch.randn(*((LEVELS,) if table else (batch, tokens)), 6 * width, generator=generator)
        gate = wide.to(device, dtype).chunk(6, dim=-1)[2]
        row = torch.randint(0, LEVELS, (batch, tokens), generator=generator).to(device) if table else None
        if not slices:  # rows in another order in memory than they are read in
            gate = gate.transpose(0, 1).contiguous().transpose(0, 1)
            row = row.t().contiguous().t() if table else None
        before = [tensor.clone() for tensor in (h, gate, x)]
        found = file.gated_sum(h, gate, x, row=row)
        assert all(torch.equal(now, then) for now, then in zip((h, gate, x), before, strict=True))
        assert_near(found, h, gate if row is None else gate[row], x)
        twin = file._gated_sum(h.float(), gate.float(), x.float(), row)
        assert_near(twin, h.float(), gate if row is None else gate[row], x)


def test_tokens_may_be_slices_and_a_gate_one_row_for_all(device, generator):
    wide = torch.randn(3, 5, 40, generator=generator).to(device)
    h, x, gate = wide[..., :16], wide[..., 20:36], torch.randn(16, generator=generator).to(device)
    assert_near(file.gated_sum(h, gate.expand_as(h), x), h, gate, x)


def test_no_tokens(device):
    table = torch.zeros(LEVELS, 8, device=device)
    for shape in ((0, 3, 8), (2, 0, 8)):
        h, row = torch.zeros(shape, device=device), torch.zeros(shape[:2], dtype=torch.int64, device=device)
        assert file.gated_sum(h, h, h).shape == shape
        assert file.gated_sum(h, table, h, row=row).shape == shape


def test_autograd_takes_the_twin(device, generator):
    h = torch.randn(2, 3, 8, generator=generator).to(device).requires_grad_(True)
    assert not runs_kernel(file.gated_sum_kernel, h)
    assert runs_kernel(file.gated_sum_kernel, h.detach())
    file.gated_sum(h.detach(), h, h.detach()).sum().backward()
    torch.testing.assert_close(h.grad, h.detach(), atol=0, rtol=0)
