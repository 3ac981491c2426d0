"""No speed-up from a wrong result: the loops of bench/loops.py against `refine_batch`, torch.compile against eager.

Both run the same algorithm from the same random numbers, on the device and in the precision that are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import loops
import subjects
import torch
from harness import say
from torch import Tensor

import ipr_fast
from ipr_fast import Denoiser

# float32 leaves 1e-5 at the most; another formula or another order of the patches moves samples by 0.1 and more.
TOLERANCE = 1e-3
CHECKED, MAY_DIFFER = 8, 1  # chains; in one, two patches may be so equally certain that rounding swaps them


def gate(model: Denoiser, network: loops.Network, device: torch.device) -> dict:
    """How far the loops are from `refine_batch`, chain by chain, with its random numbers."""
    x = subjects.samples(model, CHECKED, device)
    schedule = subjects.shortened(model.refine_schedule, subjects.num_active(model), 5)
    sampling, seed, policy = loops.Sampling(schedule, subjects.RATIO), 11, ipr_fast.random_patches(subjects.RATIO)
    expected = ipr_fast.refine_batch(x, policy, 1, model=model, schedule=schedule, seed=seed)
    ids = torch.arange(CHECKED, device=device)
    found = {
        "batched": loops.batched(network, x, 1, sampling, loops.LibraryNoise(seed, ids)),
        "one at a time": loops.one_at_a_time(
            network, x.cpu(), 1, sampling, loops.LibraryNoise(seed, ids.cpu()), device
        ).to(device),
    }
    off = {name: (images - expected).abs().flatten(1).amax(1).tolist() for name, images in found.items()}
    passed = all(sum(not each <= TOLERANCE for each in chains) <= MAY_DIFFER for chains in off.values())
    say(f"  largest differences: { {name: max(chains) for name, chains in off.items()} }, {passed=}")
    return {"passed": passed and bool((expected != x).any()), "largest_difference_of_each_chain": off}


@torch.inference_mode()
def compiled_difference(compiled: Callable, network: loops.Network, x: Tensor) -> dict:
    """How far the compiled network is from the eager one, of the largest number; no figure from a wrong one."""
    patches = network.grid.to_patches(x)
    levels = torch.rand(patches.shape[:2], device=x.device)
    active = torch.ones_like(levels, dtype=torch.bool)
    pairs = zip(compiled(patches, levels, active), network(patches, levels, active), strict=True)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(f"the compiled network is off by {difference:.2g} of the largest number")
    return {"difference": difference}
