"""Checks that the models' configurations share; each raises a ValueError that names the field.

A configuration may come from a file. The bounds are far above any network that is of use, and keep one that a file only
claims to have from taking the machine's time and memory before its weights are looked at.
"""

from __future__ import annotations

from ipr_fast.kernels.philox import MAX_PATCH_NUMEL, MAX_PATCHES
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.sampling.schedule import Schedule

MOST = 1 << 20
MOST_LAYERS = 1 << 10


def positive_int(name: str, value: object, most: int = MOST) -> int:
    """An int in 1..most."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a positive int of at most {most}, got {value!r:.80}")
    return value


def square_grid(channels: object, image_size: object, patch_size: object) -> PatchGrid:
    """The grid of square samples, with no more patches than the random numbers' counters hold."""
    for name, value in (("channels", channels), ("image_size", image_size), ("patch_size", patch_size)):
        positive_int(name, value)
    grid = PatchGrid(channels, image_size, image_size, patch_size)
    if grid.num_patches > MAX_PATCHES or grid.patch_numel > MAX_PATCH_NUMEL:
        raise ValueError(
            f"patch_size: at most {MAX_PATCHES} patches of at most {MAX_PATCH_NUMEL} numbers can be counted, got "
            f"{grid.num_patches} of {grid.patch_numel}"
        )
    return grid


def schedule_pair(name: str, value: object) -> tuple[int, float]:
    """The two numbers of a Schedule; JSON brings a list."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (steps_per_patch, overlap), got {value!r:.80}")
    schedule = Schedule(*value)
    return schedule.steps_per_patch, schedule.overlap
