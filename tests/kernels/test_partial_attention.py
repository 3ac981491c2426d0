"""The twin of attention over a cache, against its formula in float64."""

import pytest
import torch

from ipr_fast.kernels.partial_attention import bytes_moved, partial_attention

SHAPES = [(1, 1, 1), (3, 4, 16), (2, 17, 33), (1, 81, 81)]


def formula(q, keys, values, heads):
    """One head after another."""
    size = q.shape[-1] // heads
    columns = [slice(h * size, (h + 1) * size) for h in range(heads)]
    q, keys, values = q.double(), keys.double(), values.double()
    weights = [(q[..., c] @ keys[..., c].transpose(1, 2) / size**0.5).softmax(-1) for c in columns]
    return torch.cat([w @ values[..., c] for w, c in zip(weights, columns, strict=True)], dim=-1)


@pytest.mark.parametrize(("batch", "slots", "tokens"), SHAPES)
@pytest.mark.parametrize(("heads", "size"), [(6, 16), (1, 64), (3, 5)])
def test_it_is_attention(batch, slots, tokens, heads, size, generator):
    q = torch.randn(batch, slots, 3 * heads * size, generator=generator).chunk(3, dim=-1)[0]
    keys, values = torch.randn(batch, tokens, 2 * heads * size, generator=generator).chunk(2, dim=-1)
    found = partial_attention(q, keys, values, heads=heads)
    assert found.shape == (batch, slots, heads * size)
    # Numbers below 8, through products over up to 64 channels and sums over up to 81 tokens.
    torch.testing.assert_close(found.double(), formula(q, keys, values, heads), atol=8 * 145 * 2**-24, rtol=0)


def test_equal_keys_give_the_mean_of_the_values(generator):
    q, values = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    found = partial_attention(q, torch.ones(2, 5, 8), values, heads=2)
    torch.testing.assert_close(found, values.mean(1, keepdim=True).expand(2, 3, 8), atol=1e-6, rtol=0)


def test_it_has_a_derivative(generator):
    q, keys, values = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64).unbind()
    inputs = [tensor.requires_grad_(True) for tensor in (q[:, :2].contiguous(), keys, values)]
    assert torch.autograd.gradcheck(lambda *tensors: partial_attention(*tensors, heads=2), inputs)


def test_bytes():
    q, keys = torch.zeros(3, 4, 96), torch.zeros(3, 16, 96)
    assert bytes_moved(3, 4, 16, 96, 4) == 2 * q.nbytes + 2 * keys.nbytes
