import pytest
import torch

from ipr_fast.kernels.gated_sum import bytes_moved, gated_sum

LEVELS = 5


def assert_is_the_formula(found, h, gate, x):
    """A product and a sum, each rounded to float32, or both at once."""
    product = gate.double() * x.double()
    assert found.dtype == torch.float32
    assert ((found.double() - (h.double() + product)).abs() <= 2 * 2**-24 * (h.double().abs() + product.abs())).all()


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (3, 4, 96), (2, 7, 33)])
def test_each_token_has_its_gate(batch, tokens, width, generator):
    h, x = torch.randn(2, batch, tokens, width, generator=generator)
    gate = torch.randn(batch, tokens, 6 * width, generator=generator).chunk(6, dim=-1)[2]
    before = h.clone(), x.clone()
    assert_is_the_formula(gated_sum(h, gate, x), h, gate, x)
    assert torch.equal(h, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 1), (3, 4, 96), (2, 7, 33)])
@pytest.mark.parametrize("slices", [True, False])
def test_each_token_has_its_row_of_a_table(batch, tokens, width, slices, generator):
    h, x = torch.randn(2, batch, tokens, width, generator=generator)
    gate = torch.randn(LEVELS, 6 * width, generator=generator).chunk(6, dim=-1)[5]
    row = torch.randint(0, LEVELS, (batch, tokens), generator=generator)
    found = gated_sum(h, gate if slices else gate.contiguous(), x, row=row)
    assert_is_the_formula(found, h, gate[row], x)
    assert torch.equal(found, gated_sum(h, gate[row], x))


def test_no_tokens():
    for shape in ((0, 3, 8), (2, 0, 8)):
        h, row = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64)
        assert gated_sum(h, h, h).shape == shape
        assert gated_sum(h, torch.zeros(LEVELS, 8), h, row=row).shape == shape


def test_it_has_a_derivative(generator):
    h, gate, x = torch.randn(3, 2, 3, 8, generator=generator, dtype=torch.float64).unbind()
    table, row = torch.randn(LEVELS, 8, generator=generator, dtype=torch.float64), torch.tensor([[0, 4, 1], [1, 1, 3]])
    given = [tensor.requires_grad_(True) for tensor in (h, gate, x)]
    assert torch.autograd.gradcheck(gated_sum, given)
    assert torch.autograd.gradcheck(lambda *of: gated_sum(*of, row=row), [h, table.requires_grad_(True), x])


def test_bytes():
    h = torch.zeros(3, 4, 96)
    assert bytes_moved(3, 4, 96, 4, table=False) == 4 * h.nbytes
    assert bytes_moved(3, 4, 96, 4, table=True) == 3 * h.nbytes + 8 * 3 * 4
