"""The twin of attention over a cache, against its formula in float64."""

import pytest
import torch
from attention_case import attention_case

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
def test_it_is_attention_to_the_context_and_to_the_active_tokens_themselves(
    batch, slots, tokens, heads, size, generator
):
    case = attention_case(batch, slots, tokens, heads * size, generator)
    found = partial_attention(*case.arguments, heads=heads)
    assert found.shape == (batch, slots, heads * size)
    # Numbers below 8, through products over up to 64 channels and sums over up to 81 tokens.
    torch.testing.assert_close(found.double(), formula(*case.qkv, heads), atol=8 * 145 * 2**-24, rtol=0)


def test_equal_keys_give_the_mean_of_the_values(generator):
    case = attention_case(2, 3, 5, 8, generator)
    case.own[..., :8], case.cache[:, :8] = 1.0, 1.0
    mean = case.keys_values[..., 8:].mean(1, keepdim=True)
    found = partial_attention(*case.arguments, heads=2)
    torch.testing.assert_close(found, mean.expand(2, 3, 8), atol=1e-6, rtol=0)


def test_it_has_a_derivative(generator):
    q, own, cache, slot, place, _ = attention_case(2, 2, 4, 4, generator, dtype=torch.float64)
    inputs = [tensor.contiguous().requires_grad_(True) for tensor in (q, own, cache.nan_to_num())]
    assert torch.autograd.gradcheck(
        lambda q, own, cache: partial_attention(q, own, cache.clone(), slot, place, heads=2), inputs
    )


def test_bytes():
    q, keys, slot = torch.zeros(3, 4, 96), torch.zeros(3, 16, 96), torch.zeros(3, 16, dtype=torch.int32)
    assert bytes_moved(3, 4, 16, 96, 4) == 2 * q.nbytes + 2 * keys.nbytes + slot.nbytes
