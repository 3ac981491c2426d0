import pytest
import torch

from ipr_fast.kernels import context_mask as file
from ipr_fast.kernels.launch import runs_kernel
from ipr_fast.sampling.patches import ActivePatches


@pytest.mark.parametrize(
    ("batch", "slots", "tokens"), [(1, 1, 1), (3, 4, 16), (5, 20, 81), (2, 81, 81), (1, 1100, 1100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_context_mask(batch, slots, tokens, dtype, device, generator):
    count = torch.randint(0, slots + 1, (batch, 1), generator=generator)
    count[0] = slots
    mask = torch.rand(batch, tokens, generator=generator).argsort(1).argsort(1) < count
    active = ActivePatches.from_mask(mask.to(device), slots)
    slot = torch.full((2, batch, tokens + 1), 7, dtype=torch.int32, device=device)
    found = file.context_mask(active.index, active.count, slot[0], dtype)
    expected = file._context_mask(active.index, active.count, slot[1], found.stride(0), dtype)
    assert found.dtype == dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)
    assert torch.equal(*slot[:, :, :tokens])


def test_no_slots_and_no_chains(device):
    for batch, slots in ((0, 3), (2, 0)):
        index, count = torch.zeros(batch, slots, device=device).int(), torch.zeros(batch, device=device).int()
        slot = torch.zeros(batch, 6, device=device).int()
        bias = file.context_mask(index, count, slot, torch.float32)
        assert bias.shape == (batch, 1, 1, 5)
        assert not bias.any()
        assert (slot[:, :5] == -1).all()


def test_its_kernel_runs(device):
    assert runs_kernel(file.context_mask_kernel, torch.zeros(1, device=device).int())
