"""The twin of the modulated LayerNorm, against its formula in float64."""

import pytest
import torch

from ipr_fast.kernels.modulated_norm import bytes_moved, modulated_layer_norm

EPS, LEVELS = 1e-6, 5
SHAPES = [(1, 1, 1), (3, 4, 96), (2, 7, 33)]


def formula(h, scale, shift):
    h = h.double()
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * (1 + scale.double()) + shift.double()


def assert_is_the_formula(found, h, scale, shift):
    """Numbers below 16; some thirty roundings of them, and the sum over up to 96 channels."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), formula(h, scale, shift), atol=16 * (30 + 96**0.5) * 2**-24, rtol=0)


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_each_token_has_its_scale_and_shift(batch, tokens, width, generator):
    h = 3 * torch.randn(batch, tokens, width, generator=generator) + 2
    scale, shift, *_ = torch.randn(batch, tokens, 6 * width, generator=generator).chunk(6, dim=-1)
    before = h.clone()
    assert_is_the_formula(modulated_layer_norm(h, scale, shift, eps=EPS), h, scale, shift)
    assert torch.equal(h, before)


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_each_token_has_its_row_of_a_table(batch, tokens, width, generator):
    h = 3 * torch.randn(batch, tokens, width, generator=generator) + 2
    scale, shift, *_ = torch.randn(LEVELS, 6 * width, generator=generator).chunk(6, dim=-1)
    row = torch.randint(0, LEVELS, (batch, tokens), generator=generator)
    found = modulated_layer_norm(h, scale, shift, eps=EPS, row=row)
    assert_is_the_formula(found, h, scale[row], shift[row])
    assert torch.equal(found, modulated_layer_norm(h, scale[row], shift[row], eps=EPS))


def test_a_constant_token_becomes_its_shift():
    h, shift = torch.full((1, 2, 8), 3.0), torch.arange(8.0).expand(1, 2, 8)
    assert torch.equal(modulated_layer_norm(h, torch.ones(1, 2, 8), shift, eps=EPS), shift)


def test_it_has_a_derivative(generator):
    h, scale, shift = torch.randn(3, 2, 3, 8, generator=generator, dtype=torch.float64).unbind()
    inputs = [tensor.requires_grad_(True) for tensor in (h, scale, shift)]
    assert torch.autograd.gradcheck(lambda *tensors: modulated_layer_norm(*tensors, eps=EPS), inputs)


def test_bytes():
    h = torch.zeros(3, 4, 96)
    assert bytes_moved(3, 4, 96, 4) == 4 * h.nbytes
    assert bytes_moved(3, 4, 96, 4, table=True) == 2 * h.nbytes + 8 * 3 * 4
