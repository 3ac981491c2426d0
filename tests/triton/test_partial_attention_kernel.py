import pytest
import torch
from attention_case import attention_case

from ipr_fast.kernels import partial_attention as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1), (3, 4, 16), (2, 6, 18), (3, 7, 16), (2, 20, 81), (1, 64, 256), (2, 17, 33), (1, 81, 81)]


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def attend(q, keys_values, heads):
    """The twin's attention, all keys being in the cache."""
    batch, tokens, width = keys_values.shape
    cache = torch.cat([keys_values.flatten(0, 1), keys_values.new_zeros(1, width)])
    slot, nothing = (cache.new_zeros(batch, size, dtype=torch.int64) for size in (tokens + 1, 0))
    return file._partial_attention(q, keys_values[:, :0], cache, slot, nothing, heads)


@pytest.mark.parametrize(("batch", "slots", "tokens"), [*SHAPES, (1, 3, 1024)])
@pytest.mark.parametrize(("heads", "head_size"), [(6, 16), (3, 24), (1, 64), (1, 128)])
def test_it_is_attention(batch, slots, tokens, heads, head_size, device, generator):
    for dtype in types(device):
        case = attention_case(batch, slots, tokens, heads * head_size, generator, device, dtype)
        found = file.partial_attention(*case.arguments, heads=heads)
        expected = attend(case.q.double(), case.keys_values.double(), heads)
        theirs = attend(case.q, case.keys_values, heads)
        assert found.dtype == dtype
        # At most twice the error of PyTorch's own, and what rounding leaves where that has none.
        allowed = 2 * (theirs.double() - expected).abs().max() + 8 * torch.finfo(dtype).eps
        assert (found.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize(("batch", "slots", "tokens"), [*SHAPES[1:-1], (1, 3, 300)])
@pytest.mark.parametrize(("heads", "head_size"), [(6, 16), (3, 24), (1, 64), (1, 128)])
def test_the_contexts_attention(batch, slots, tokens, heads, head_size, device, generator):
    for dtype in types(device):
        case = attention_case(batch, slots, tokens, heads * head_size, generator, device, dtype)
        q = torch.randn(batch, tokens, heads * head_size, generator=generator).to(device, dtype)
        context = case.slot[:, :tokens] < 0
        context_alone = context.any(1)  # a chain without context has meaningless results
        bias = torch.where(context, 0.0, -torch.inf)[:, None, None]
        given = q, case.keys_values, case.cache, case.slot
        found = file.context_attention(*given, bias.to(dtype), heads=heads)
        expected = file._context_attention(q.double(), case.keys_values.double(), bias.double(), heads)
        theirs = file._context_attention(q, case.keys_values, bias.to(dtype), heads)
        assert found.isfinite().all()
        # At most twice the error of PyTorch's own, and what rounding leaves where that has none.
        allowed = 2 * (theirs.double() - expected)[context_alone].abs().max() + 8 * torch.finfo(dtype).eps
        assert (found.double() - expected)[context_alone].abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [4, 20])
def test_a_chain_has_the_same_result_in_every_batch(slots, dtype, device, generator):
    case = attention_case(5, slots, 33, 96, generator, device, dtype)
    whole = file.partial_attention(*case.arguments, heads=6)
    q, own, cache, slot, _ = case.arguments
    for first, last in ((0, 2), (2, 5)):
        chains, rows = slice(first, last), slice(33 * first, 33 * last + 1)
        few = file.partial_attention(q[chains], own[chains], cache[rows], slot[chains], None, heads=6)
        assert torch.equal(few, whole[chains])


@pytest.mark.parametrize("slots", [4, 20])
def test_large_logits_stay_finite(slots, device, generator):
    case = attention_case(1, slots, 20, 32, generator, device)
    case.q.fill_(60.0)
    keys_values = torch.zeros(20, 64, device=device)
    keys_values[:, 32:] = torch.arange(20.0, device=device)[:, None]
    keys_values[7, :32] = 60.0
    case.cache[:-1] = keys_values
    is_active = case.slot[0, :20] >= 0
    case.own[0, case.slot[0, :20][is_active].long()] = keys_values[is_active]
    found = file.partial_attention(*case.arguments, heads=2)
    assert torch.equal(found, torch.full((1, slots, 32), 7.0, device=device))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_attend_for(shape, device, generator):
    q, own = torch.zeros(*shape, 32, device=device), torch.zeros(*shape, 64, device=device)
    cache, slot = torch.zeros(shape[0] * 5 + 1, 64, device=device), torch.zeros(shape[0], 6, device=device).int()
    found = file.partial_attention(q, own, cache, slot, slot[:, :0].long(), heads=2)
    assert found.shape == (*shape, 32)


@pytest.mark.parametrize("slots", [3, 9])
def test_a_cache_of_another_type_is_read_as_the_queries(slots, device, generator):
    """As under autocast."""
    q, own, cache, slot, place, _ = attention_case(2, slots, 9, 32, generator, device)
    low = file.partial_attention(q.half(), own.half(), cache.clone(), slot, place, heads=2)
    assert low.dtype == torch.float16
    assert torch.equal(low, file.partial_attention(q.half(), own.half(), cache.half(), slot, place, heads=2))


def test_scattered_rows_are_refused(device, generator):
    q, own, cache, slot, place, _ = attention_case(2, 3, 5, 32, generator, device)
    with pytest.raises(ValueError, match=r"cache must have contiguous rows, got strides \(1, 11\)"):
        file.partial_attention(q, own, cache.t().contiguous().t(), slot, place, heads=2)


def test_autograd_and_float64_take_the_twin(device, generator):
    q, own, cache, slot, place, _ = attention_case(2, 3, 5, 32, generator, device)
    assert file.partial_attention(q, own.clone().requires_grad_(), cache, slot, place, heads=2).requires_grad
    assert not runs_kernel(file.partial_attention_kernel, q.double(), q.double())
    assert runs_kernel(file.partial_attention_kernel, q, own, None)
