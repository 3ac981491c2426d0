import pytest
import torch

from ipr_fast.kernels import partial_attention as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1), (3, 4, 16), (2, 20, 81), (1, 64, 256), (2, 17, 33), (1, 81, 81), (1, 3, 1024)]


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


@pytest.mark.parametrize(("batch", "slots", "tokens"), SHAPES)
@pytest.mark.parametrize(("heads", "head_size"), [(6, 16), (2, 24), (1, 64), (1, 128)])
def test_it_is_attention(batch, slots, tokens, heads, head_size, device, generator):
    for dtype in types(device):
        width = heads * head_size
        projected = torch.randn(batch, slots, 3 * width, generator=generator).to(device, dtype)
        q = projected.chunk(3, dim=-1)[0]  # a slice, as in the network
        cache = torch.randn(2, batch * tokens + 1, width, generator=generator).to(device, dtype)
        cache[:, -1] = float("nan")  # the spare row
        keys, values = (rows[:-1].view(batch, tokens, width) for rows in cache)
        found = file.partial_attention(q, keys, values, heads=heads)
        expected = file._partial_attention(q.double(), keys.double(), values.double(), heads)
        theirs = file._partial_attention(q, keys, values, heads)
        assert found.dtype == dtype
        # At most twice the error of PyTorch's own, and what rounding leaves where that has none.
        allowed = 2 * (theirs.double() - expected).abs().max() + 8 * torch.finfo(dtype).eps
        assert (found.double() - expected).abs().max() <= allowed


def test_large_logits_stay_finite(device):
    q = torch.full((1, 4, 32), 60.0, device=device)
    keys = torch.zeros(1, 20, 32, device=device)
    keys[:, 7] = 60.0
    values = torch.arange(20.0, device=device)[None, :, None].expand(1, 20, 32).contiguous()
    assert torch.equal(file.partial_attention(q, keys, values, heads=2), torch.full((1, 4, 32), 7.0, device=device))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_attend_for(shape, device):
    keys = torch.zeros(shape[0], 5, 32, device=device)
    assert file.partial_attention(torch.zeros(*shape, 32, device=device), keys, keys, heads=2).shape == (*shape, 32)


def test_a_cache_of_another_type_is_read_as_the_queries(device, generator):
    q, keys = (
        torch.randn(2, 3, 32, generator=generator).to(device),
        torch.randn(2, 5, 32, generator=generator).to(device),
    )
    low = file.partial_attention(q.half(), keys, keys, heads=2)
    assert low.dtype == torch.float16
    assert torch.equal(low, file.partial_attention(q.half(), keys.half(), keys.half(), heads=2))


def test_scattered_rows_are_refused(device):
    q, keys = torch.zeros(2, 3, 32, device=device), torch.zeros(2, 5, 32, device=device)
    with pytest.raises(ValueError, match=r"keys must have contiguous rows, got strides \(160, 1, 5\)"):
        file.partial_attention(q, torch.zeros(2, 32, 5, device=device).transpose(1, 2), keys, heads=2)


def test_autograd_and_float64_take_the_twin(device):
    q, keys = torch.zeros(2, 3, 32, device=device), torch.zeros(2, 5, 32, device=device, requires_grad=True)
    assert file.partial_attention(q, keys, keys, heads=2).requires_grad
    assert not runs_kernel(file.partial_attention_kernel, q.double(), q.double())
    assert runs_kernel(file.partial_attention_kernel, q, keys.detach(), None)
