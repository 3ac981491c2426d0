"""The twin that tells context tokens from active ones."""

import pytest
import torch

from ipr_fast.kernels.context_mask import bytes_moved, context_mask
from ipr_fast.sampling.patches import ActivePatches


def masks(batch, tokens, generator):
    """Random masks of active tokens; of none and of all in the first chains."""
    mask = torch.rand(batch, tokens, generator=generator) < 0.5
    mask[0], mask[1] = False, True
    return mask


@pytest.mark.parametrize(("tokens", "width"), [(16, 32), (15, 16), (81, 96)])
def test_a_mask_needs_no_alignment(tokens, width, generator):
    """On a GPU, torch's attention copies a mask whose rows are not multiples of 16 numbers, in each layer."""
    mask = masks(10, tokens, generator)
    active = ActivePatches.from_mask(mask)
    bias = context_mask(active.index, active.count, torch.zeros(10, tokens + 1).int(), torch.float32)
    mask[1] = False  # without context, tokens attend to each other
    assert torch.equal(bias[:, 0, 0], torch.zeros(10, tokens).masked_fill(mask, -torch.inf))
    assert bias.stride()[::3] == (width, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_slots_are_those_of_the_active_tokens(dtype, generator):
    mask = masks(10, 16, generator)
    active, slot = ActivePatches.from_mask(mask, 16), torch.full((10, 17), 99, dtype=torch.int32)
    assert context_mask(active.index, active.count, slot, dtype).dtype == dtype
    expected = torch.where(mask, mask.cumsum(1) - 1, -1)
    assert torch.equal(slot[:, :16].long(), expected)


def test_bytes():
    index, slot, bias = torch.zeros(3, 4).int(), torch.zeros(3, 16).int(), torch.zeros(3, 16, dtype=torch.float16)
    assert bytes_moved(3, 4, 16, 2) == index.nbytes + slot.nbytes + bias.nbytes
