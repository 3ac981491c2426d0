"""Correctness gates: what is timed must agree with `backend="reference"`, in the precision that is timed.

Both run the same algorithm with the same random numbers, on the measured device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from baselines import loops
from torch import Tensor

import ipr_fast
from ipr_fast import ActivePatches, Denoiser, Prediction
from support import subjects
from support.measure import Check

# float32 leaves 1e-5 at the most; another formula or another order of the patches moves samples by 0.1 and more.
TOLERANCE = 1e-3
ROUNDING = 1e-5  # of the largest value: float32 through a forward pass, summed in another order
CHECKED, MAY_DIFFER = 4, 1  # chains; in one, rounding may swap two equally uncertain patches


def closeness(found: Tensor, expected: Tensor, name: str) -> Check:
    """Return the largest difference of samples (B, C, H, W) from those expected; NaN or inf in any chain fails.

    With CHECKED chains or more, the MAY_DIFFER worst ones are left out.
    """
    if not found.isfinite().all():
        return Check(name, float("inf"), TOLERANCE)
    off = (found - expected).abs().flatten(1).amax(1).sort().values
    return Check(name, off[-1 - MAY_DIFFER if len(off) >= CHECKED else -1].item(), TOLERANCE)


def loops_and_engine(model: Denoiser, network: loops.Network, sampling: loops.Sampling, device: torch.device) -> Check:
    """Check `refine_batch` and both loops, with its random numbers, against the reference; return the worst check."""
    x, ids = subjects.samples(model, CHECKED, device), torch.arange(CHECKED)
    policy = ipr_fast.random_patches(sampling.ratio)
    ours = {"model": model, "schedule": sampling.schedule, "seed": 11}
    expected = ipr_fast.refine_batch(x, policy, 1, backend="reference", **ours)
    assert (expected != x).any(), "nothing was refined"
    noise = loops.LibraryNoise(11, ids)
    found = {
        "refine_batch": ipr_fast.refine_batch(x, policy, 1, **ours),
        "batched": loops.batched(network, x, 1, sampling, noise._replace(chain_ids=ids.to(device))),
        "one at a time": loops.one_at_a_time(network, x.cpu(), 1, sampling, noise, device).to(device),
    }
    checks = [closeness(images, expected, f"the reference, {name}") for name, images in found.items()]
    return max(checks, key=lambda check: check.difference)


def predictions(found: Prediction, expected: Prediction, name: str, tolerance: float = ROUNDING) -> Check:
    """Check a prediction against the expected one, relative to the largest value of each field."""
    off = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    return Check(name, max(off), tolerance)


@torch.inference_mode()
def compiled(fast: Callable, network: loops.Network, x: Tensor) -> Check:
    """Check the compiled network against the eager one."""
    patches = network.grid.to_patches(x)
    levels = uniform(patches)
    call = patches, levels, torch.ones_like(levels, dtype=torch.bool)
    return predictions(fast(*call), network(*call), "the eager network", TOLERANCE)


@torch.inference_mode()
def lower_precision(model: Denoiser, network: Callable, exact: Denoiser) -> Check:
    """Check the velocity of a model in lower precision against `exact`, the same model in float32.

    The tolerance is twice the error of the plain network in that precision.
    """
    patches = exact.grid.to_patches(subjects.samples(exact, CHECKED, next(exact.parameters()).device))
    number = subjects.num_active(exact)
    is_active = uniform(patches, seed=1).argsort(1) < number
    active, levels = ActivePatches.from_mask(is_active, number), uniform(patches) * is_active
    expected, ours = (each(patches, active.gather(levels), active).velocity for each in (exact, model))
    theirs = active.gather(network(patches, levels, is_active).velocity)
    off, may = ((found.float() - expected).abs().max().item() for found in (ours, theirs))
    return Check("float32", off, 2 * may)


def uniform(patches: Tensor, seed: int = 0) -> Tensor:
    """Return a random number in [0, 1) for each patch, (B, N)."""
    generator = torch.Generator(patches.device).manual_seed(seed)
    return torch.rand(patches.shape[:2], generator=generator, device=patches.device)
