"""Which patches an iteration of `refine_batch` renoises: the policy's or the mask_fn's choice among the free ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.renoise import PatchChoice
from ipr_fast.masks import MaskPolicy, RandomPatches, all_patches, fixed_patches, random_patches
from ipr_fast.patches import PatchGrid

MaskFn = Callable[[Tensor, int], Tensor]


class Selection(NamedTuple):
    """The patches (B, N) of one iteration, a number that no chain's count exceeds, and the slots to hold them.

    With a `choice` that is still to be made, the engine makes it and writes the mask.
    """

    mask: Tensor
    most_active: int
    slots: int
    choice: PatchChoice | None = None


class Selector:
    """What each iteration renoises: a policy's choice, or that of a Python mask_fn, among the free patches."""

    def __init__(
        self, mask_fn: MaskPolicy | MaskFn, grid: PatchGrid, free: Tensor, chain_ids: Tensor, seed: int
    ) -> None:
        if any(mask_fn is make for make in (random_patches, fixed_patches, all_patches)):
            raise ValueError(f"mask_fn: {mask_fn.__name__} makes a policy, call it: {mask_fn.__name__}(...)")
        if isinstance(mask_fn, MaskPolicy):
            mask_fn = mask_fn.bind(grid, len(free), free.device)
            self.most_active = int(mask_fn.sizes(free).max()) if len(free) else 0
        elif not callable(mask_fn):
            raise ValueError(
                f"mask_fn must be a mask policy or a callable mask_fn(x, iteration), got {type(mask_fn).__name__}"
            )
        self.mask_fn, self.grid, self.free = mask_fn, grid, free
        self.counters = {"chain_ids": chain_ids, "seed": seed}

    def __call__(self, iteration: int, on_device: Tensor, images: Callable[[], Tensor]) -> Selection:
        """For one iteration, whose number is also given as a scalar tensor; `images` makes x for a Python mask_fn."""
        if isinstance(self.mask_fn, RandomPatches):
            choice = self.mask_fn.choice(self.free, on_device)
            return Selection(torch.zeros_like(self.free), self.most_active, self.most_active, choice)
        if isinstance(self.mask_fn, MaskPolicy):
            mask = self.mask_fn.choose(self.free, iteration=on_device, **self.counters) & self.free
            return Selection(mask, self.most_active, self.most_active)
        name = f"mask_fn {name_of(self.mask_fn)}"
        mask = guarded(name, iteration, self.mask_fn, images(), iteration)
        mask = checks.patch_mask(name, mask, len(self.free), self.grid, self.free.device) & self.free
        most_active = int(mask.sum(1).max())
        return Selection(mask, most_active, slot_bucket(most_active, self.grid.num_patches))

    def freeze(self, chains: Tensor | None) -> bool:
        """Take the patches of frozen chains out of the free ones; True when no chain is left."""
        if chains is None:
            return False
        self.free = self.free & ~chains.to(self.free.device)[:, None]
        return not bool(self.free.any())


def slot_bucket(most_active: int, num_patches: int) -> int:
    """A number of slots that holds `most_active`, out of at most nine: a varying mask must not vary the buffers."""
    width = -(-num_patches // 8)
    return min(num_patches, -(-most_active // width) * width)


def guarded(name: str, iteration: int, function: Callable, *args: object) -> object:
    """Call a user's function; whatever it raises comes back as a RuntimeError that names it."""
    try:
        return function(*args)
    except Exception as error:
        raise RuntimeError(f"{name} raised {type(error).__name__} in iteration {iteration}: {error}") from error


def name_of(function: Callable) -> str:
    """What to call a user's function in a message."""
    return getattr(function, "__qualname__", type(function).__qualname__)
