"""The choice of patches inside renoise's kernel, where keys are equal as well, which Philox makes rare."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ipr_fast.kernels.launch import jit  # noqa: E402
from ipr_fast.kernels.renoise import smallest  # noqa: E402


@jit
def smallest_kernel(p_out, p_candidates, p_key, size, N_BLOCK: tl.constexpr):
    o_patch = tl.arange(0, N_BLOCK)
    candidates = tl.load(p_candidates + o_patch) != 0
    chosen = smallest(candidates, tl.load(p_key + o_patch).to(tl.uint32), o_patch, size)
    tl.store(p_out + o_patch, chosen.to(tl.int8))


@pytest.mark.parametrize("num_patches", [16, 256, 4096])
@pytest.mark.parametrize("values", [1, 3, 2**32])
@pytest.mark.parametrize("share", [-0.1, 0.0, 0.25, 0.99, 1.0, 2.0])
def test_the_smallest_keys_are_chosen_and_among_equal_ones_the_first(num_patches, values, share, device, generator):
    """Keys of one value, of three with the largest key among them, and of all; sizes below 0 and beyond the number."""
    key = torch.randint(0, values, (num_patches,), generator=generator)
    key = torch.where(key == 2, 2**32 - 1, key) if values == 3 else key
    candidates = torch.rand(num_patches, generator=generator) < 0.7
    size = int(share * int(candidates.sum()))
    out = torch.full((num_patches,), -1, dtype=torch.int8, device=device)
    smallest_kernel[(1,)](out, candidates.to(torch.int8).to(device), key.to(device), size, N_BLOCK=num_patches)
    ordered = sorted((int(key[n]), n) for n in candidates.nonzero().flatten().tolist())
    assert out.nonzero().flatten().tolist() == sorted(n for _, n in ordered[: max(0, size)])
