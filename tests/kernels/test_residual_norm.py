"""The twins of a sum into the residual stream and its norm, against their formula in float64."""

import pytest
import torch

from ipr_fast.kernels.modulated_norm import modulated_layer_norm
from ipr_fast.kernels.residual_norm import bytes_moved, embedded_norm, gated_norm

EPS, LEVELS, PATCHES = 1e-6, 5, 11
SHAPES = [(1, 1, 1), (3, 4, 96), (2, 7, 33)]


def modulation(*shape, width, generator):
    """Scale, shift and gate, slices of a wider tensor."""
    return torch.randn(*shape, 6 * width, generator=generator).chunk(6, dim=-1)[:3]


def assert_is_the_formula(found, of, scale, shift):
    """The sum is the first of `of` plus the product of the others, in two roundings; the norm has tests of its own."""
    total, normed = found
    first, *others = (each.double() for each in of)
    product = torch.stack(torch.broadcast_tensors(*others)).prod(0)
    assert total.dtype == normed.dtype == torch.float32
    assert ((total.double() - (first + product)).abs() <= 2 * 2**-24 * (first.abs() + product.abs())).all()
    assert torch.equal(normed, modulated_layer_norm(total, scale, shift, eps=EPS))


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_each_token_has_its_modulation(batch, tokens, width, generator):
    h, x = torch.randn(2, batch, tokens, width, generator=generator)
    scale, shift, gate = modulation(batch, tokens, width=width, generator=generator)
    before = h.clone(), x.clone()
    assert_is_the_formula(gated_norm(h, gate, x, scale, shift, eps=EPS), (h, gate, x), scale, shift)
    assert torch.equal(h, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_each_token_has_its_row_of_tables(batch, tokens, width, generator):
    h, x = torch.randn(2, batch, tokens, width, generator=generator)
    scale, shift, gate = modulation(LEVELS, width=width, generator=generator)
    row = torch.randint(0, LEVELS, (batch, tokens), generator=generator)
    found = gated_norm(h, gate, x, scale, shift, eps=EPS, row=row)
    assert_is_the_formula(found, (h, gate[row], x), scale[row], shift[row])


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
@pytest.mark.parametrize("tables", [True, False])
def test_each_token_has_its_row_of_an_embedding(batch, tokens, width, tables, generator):
    x, embedding = torch.randn(batch, tokens, width, generator=generator), torch.randn(PATCHES, width)
    scale, shift, _ = modulation(*((LEVELS,) if tables else (batch, tokens)), width=width, generator=generator)
    row = torch.randint(0, LEVELS, (batch, tokens), generator=generator) if tables else None
    index = torch.randint(-1, PATCHES, (batch, tokens), generator=generator, dtype=torch.int32)
    found = embedded_norm(embedding, index, x, scale, shift, eps=EPS, row=row)
    if tables:
        scale, shift = scale[row], shift[row]
    assert_is_the_formula(found, (embedding[index.clamp(min=0)], x), scale, shift)


def test_no_tokens():
    for shape in ((0, 3, 8), (2, 0, 8)):
        h, row, index = torch.zeros(shape), torch.zeros(shape[:2]).long(), torch.zeros(shape[:2]).int()
        table = torch.zeros(LEVELS, 8)
        for found in (
            gated_norm(h, h, h, h, h, eps=EPS),
            gated_norm(h, table, h, table, table, eps=EPS, row=row),
            embedded_norm(table, index, h, h, h, eps=EPS),
        ):
            assert [each.shape for each in found] == [shape, shape]


def test_it_has_a_derivative(generator):
    h, gate, x, scale, shift = torch.randn(5, 2, 3, 8, generator=generator, dtype=torch.float64).unbind()
    embedding = torch.randn(PATCHES, 8, generator=generator, dtype=torch.float64)
    index = torch.tensor([[0, 4, -1], [1, 1, 10]], dtype=torch.int32)
    given = [tensor.requires_grad_(True) for tensor in (h, gate, x, scale, shift)]
    assert torch.autograd.gradcheck(lambda *of: gated_norm(*of, eps=EPS), given)
    given = [tensor.requires_grad_(True) for tensor in (embedding, x, scale, shift)]
    assert torch.autograd.gradcheck(lambda first, *of: embedded_norm(first, index, *of, eps=EPS), given)


def test_bytes():
    h, tokens = torch.zeros(3, 4, 96), 3 * 4
    assert bytes_moved(3, 4, 96, 4, table=False) == 7 * h.nbytes
    assert bytes_moved(3, 4, 96, 4, table=True) == 4 * h.nbytes + 8 * tokens
    assert bytes_moved(3, 4, 96, 4, table=True, embeds=True) == 3 * h.nbytes + 12 * tokens
    assert bytes_moved(3, 4, 96, 4, table=False, embeds=True) == 5 * h.nbytes + 4 * tokens
