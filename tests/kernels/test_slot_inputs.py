import pytest
import torch

from ipr_fast import ActivePatches
from ipr_fast.kernels.slot_inputs import SlotInputs, bytes_moved, slot_inputs

LEVELS = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0, 1.0])  # the last one repeated


@pytest.mark.parametrize(("batch", "num_patches", "slots", "numel"), [(1, 1, 1, 1), (3, 16, 4, 64), (2, 9, 9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_get_their_patches_and_rows(batch, num_patches, slots, numel, dtype, generator):
    patches = torch.randn(batch, num_patches, numel, generator=generator)
    mask = torch.rand(batch, num_patches, generator=generator).argsort(1).argsort(1) < slots
    mask[-1, num_patches // 2 :] = False
    active = ActivePatches.from_mask(mask, slots)
    wanted = torch.randint(0, 5, (batch, slots), generator=generator)
    found = slot_inputs(patches, active.index, LEVELS[wanted], LEVELS, dtype)
    assert found.values.dtype == dtype
    assert torch.equal(found.values, active.gather(patches).to(dtype))
    assert torch.equal(found.row, wanted)
    assert torch.equal(found.place, active.rows(num_patches))
    out = SlotInputs.allocate(batch, slots, num_patches, numel, dtype, torch.device("cpu"))
    assert slot_inputs(patches, active.index, LEVELS[wanted], LEVELS, dtype, out=out).values is out.values
    assert all(map(torch.equal, out, found))
    assert [len(each) for each in out.first(1)] == [1, 1, 1]


def test_no_slots_and_no_chains():
    for batch, slots in ((0, 3), (2, 0)):
        index, level = torch.zeros(batch, slots, dtype=torch.int32), torch.zeros(batch, slots)
        found = slot_inputs(torch.zeros(batch, 4, 8), index, level, LEVELS, torch.float32)
        assert [each.shape for each in found] == [(batch, slots, 8), (batch, slots), (batch, slots)]


def test_bytes():
    values, row = torch.zeros(3, 4, 64, dtype=torch.float16), torch.zeros(3, 4, dtype=torch.int64)
    assert bytes_moved(3, 4, 64, 2) == 3 * values.nbytes + 3 * row.nbytes  # float32 and half; two rows, index and level
