"""The kernel of `mask_tokens` against its torch twin."""

import pytest
import torch

pytest.importorskip("triton")

from ipr_fast.kernels import mask_tokens as module
from ipr_fast.kernels.mask_tokens import mask_tokens
from ipr_fast.kernels.philox import seed_tensor
from ipr_fast.kernels.renoise import PatchChoice

MASK = 7


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (5, 37), (2, 1500)])
@pytest.mark.parametrize("chooses", [True, False])
def test_kernel_and_twin_mask_the_same_positions(batch, length, chooses, device, generator, monkeypatch):
    tokens = torch.randint(0, MASK, (batch, length), generator=generator).to(device)
    free = (torch.rand(batch, length, generator=generator) < 0.7).to(device)
    free[0] = False
    size = (free.sum(1) + 1) // 2
    slots = length if not chooses else max(1, int(size.max()))
    found = []
    for limit in (module.MAX_PROGRAM_PATCHES, 0):
        monkeypatch.setattr(module, "MAX_PROGRAM_PATCHES", limit)
        out, mask = tokens.clone(), torch.zeros_like(free) if chooses else free.clone()
        index = torch.full((batch, slots), 99, dtype=torch.int32, device=device)
        count, step = torch.full((batch,), 9, dtype=torch.int32, device=device), torch.full((batch,), 5, device=device)
        mask_tokens(
            out,
            mask,
            index=index,
            count=count,
            step=step,
            mask_id=MASK,
            chain_ids=torch.arange(batch, device=device),
            seed=seed_tensor(3, device),
            choice=PatchChoice(free, size, torch.tensor(4, device=device)) if chooses else None,
        )
        found.append((out, mask, index, count, step))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    out, mask, index, count, step = found[0]
    assert torch.equal(out, tokens.masked_fill(mask, MASK))
    assert torch.equal(count.long(), size if chooses else free.sum(1))
    assert (step == -1).all()
    assert ((index >= 0).sum(1) == count).all()
