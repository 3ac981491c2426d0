import pytest
import torch
from norms import types

from ipr_fast.kernels import slot_inputs as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1), (5, 4, 16), (3, 81, 5), (2, 16, 192), (1, 300, 12), (1, 2, 1030), (4, 9, 64)]


@pytest.mark.parametrize(("batch", "num_patches", "numel"), SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_slot_inputs(batch, num_patches, numel, rows, device, generator):
    slots = max(1, num_patches // 2)
    index = torch.rand(batch, num_patches, generator=generator).argsort(1)[:, :slots].sort(1).values.int().to(device)
    index[-1, slots // 2 :] = -1
    levels = torch.rand(rows, generator=generator).sort().values.to(device)
    level = levels[torch.randint(0, rows, (batch, slots), generator=generator).to(device)]
    level[:, ::3] = torch.rand(batch, len(range(0, slots, 3)), generator=generator).to(device)  # in no row
    patches = torch.randn(batch, numel, num_patches, generator=generator).to(device).transpose(1, 2)
    for dtype in types(device):
        found = file.slot_inputs(patches, index, level, levels, dtype)
        expected = file._slot_inputs(patches, index, level, levels, dtype)
        for here, there in zip(found, expected, strict=True):
            assert here.dtype == there.dtype
            assert torch.equal(here, there)
        out = file.SlotInputs.allocate(batch, slots, num_patches, numel, dtype, device)
        file.slot_inputs(patches, index, level, levels, dtype, out=out)
        assert all(map(torch.equal, out, expected))


def test_no_slots_and_no_chains(device):
    for batch, slots in ((0, 3), (2, 0)):
        index, level = (torch.zeros(batch, slots, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
        found = file.slot_inputs(
            torch.zeros(batch, 4, 8, device=device), index, level, torch.zeros(1, device=device), torch.float32
        )
        assert [each.shape for each in found] == [(batch, slots, 8), (batch, slots), (batch, slots)]


def test_autograd_takes_the_twin(device):
    patches = torch.zeros(2, 4, 8, device=device, requires_grad=True)
    assert not runs_kernel(file.slot_inputs_kernel, patches)
    assert runs_kernel(file.slot_inputs_kernel, patches.detach())
