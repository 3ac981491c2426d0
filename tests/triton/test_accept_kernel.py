"""The kernel of `accept` against its torch twin."""

import pytest
import torch

pytest.importorskip("triton")

from ipr_fast.kernels import accept as module
from ipr_fast.kernels.accept import Kept, accept
from ipr_fast.kernels.philox import seed_tensor


@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 7), (3, 1500), (0, 4), (6,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("keeps_best", [False, True])
def test_kernel_and_twin_decide_alike(shape, dtype, keeps_best, device, generator, monkeypatch):
    batch = shape[0]
    values, old, before = (torch.randn(shape, generator=generator).mul(100).to(dtype) for _ in range(3))
    reward, kept_reward, best_reward = torch.randn(3, batch, generator=generator).double()
    reward[:1], kept_reward[:1] = -torch.inf, -torch.inf
    ids = torch.arange(batch) + (1 << 32) - 5
    found = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(module, "runs_kernel", lambda *tensors: False)
        new, kept = values.clone().to(device), Kept(old.clone().to(device), kept_reward.clone().to(device))
        best = Kept(before.clone().to(device), best_reward.clone().to(device)) if keeps_best else None
        accepted, improved = (torch.zeros(batch, dtype=torch.bool, device=device) for _ in range(2))
        accept(
            new,
            reward.to(device),
            kept=kept,
            accepted=accepted,
            temperature=torch.tensor(0.7, dtype=torch.float64, device=device),
            iteration=torch.tensor(9, device=device),
            chain_ids=ids.to(device),
            seed=seed_tensor(1 << 63, device),
            best=best,
            improved=improved if keeps_best else None,
        )
        found.append([new, *kept, accepted, improved, *(best or ())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
