"""Which patches an iteration of `refine_batch` renoises: the policy's or the mask_fn's choice among the free ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.renoise import PatchChoice
from ipr_fast.sampling import arguments, user_code
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.sampling.policies import (
    AllPatches,
    FixedPatches,
    MaskPolicy,
    RandomPatches,
    all_patches,
    fixed_patches,
    random_patches,
)
from ipr_fast.trace import span

MaskFn = Callable[[Tensor, int], Tensor]

TRUSTED = (RandomPatches, FixedPatches, AllPatches)  # never choose more patches than their sizes say


class Selection(NamedTuple):
    """The patches that one iteration renoises.

    mask    (B, N) bool
    counts  (B,) int64 on the CPU: upper bounds of the patches in each chain
    choice  a random choice that the engine makes and writes into the mask
    varies  True if counts differ from iteration to iteration
    """

    mask: Tensor
    counts: Tensor
    choice: PatchChoice | None = None
    varies: bool = False


class Selector:
    """What each iteration renoises: a policy's choice, or that of a Python mask_fn, among the free patches.

    most_active: a number that no chain's count of active patches will exceed.
    """

    def __init__(
        self, mask_fn: MaskPolicy | MaskFn, grid: PatchGrid, free: Tensor, chain_ids: Tensor, seed: int
    ) -> None:
        if any(mask_fn is make for make in (random_patches, fixed_patches, all_patches)):
            raise ValueError(f"mask_fn: {mask_fn.__name__} makes a policy, call it: {mask_fn.__name__}(...)")
        self.mask_fn, self.grid, self.free = mask_fn, grid, free
        self.counters = {"chain_ids": chain_ids, "seed": seed}
        self.sizes: Tensor | None = None  # of a policy, while the free patches stay the same ...
        self.counts: Tensor | None = None  # ... and those on the CPU
        self._excess: Tensor | None = None  # the most patches that a policy has chosen beyond its sizes
        self.most_active = grid.num_patches
        if isinstance(mask_fn, MaskPolicy):
            self.mask_fn = self._bound()
            self.sizes = self._sizes()
            self.counts = self.sizes.cpu()
            self.most_active = max(self.counts.tolist(), default=0)
        elif not callable(mask_fn):
            raise ValueError(
                f"mask_fn must be a mask policy or a callable mask_fn(x, iteration), got {type(mask_fn).__name__}"
            )

    def __call__(self, iteration: int, on_device: Tensor, images: Callable[[], Tensor]) -> Selection:
        """For one iteration, whose number is also given as a scalar tensor; `images` makes x for a Python mask_fn."""
        if type(self.mask_fn) is RandomPatches:
            choice = self.mask_fn.choice(self.free, on_device)
            return Selection(torch.zeros_like(self.free), self.counts, choice)
        if isinstance(self.mask_fn, MaskPolicy):
            return Selection(self._chosen(iteration, on_device), self.counts)
        name = f"mask_fn {checks.name_of(self.mask_fn)}"
        with span("mask_fn"):
            mask = user_code.call(name, iteration, self.mask_fn, images(), iteration)
        mask = arguments.patch_mask(name, mask, len(self.free), self.grid, self.free.device) & self.free
        return Selection(mask, mask.sum(1).cpu(), varies=True)  # the one look at the data

    def verify(self) -> None:
        """Raise ValueError where a policy has chosen more patches than its `sizes` said; one look at the data."""
        if self._excess is not None and int(self._excess) > 0:
            raise ValueError(
                f"{self._name}: its `choose` returned up to {int(self._excess)} patches more for a chain than its "
                "`sizes` said. A chain gets the steps for so many, and the others would stay noise: let `sizes` give "
                "the most that `choose` can return"
            )

    @property
    def _is_trusted(self) -> bool:
        return type(self.mask_fn) in TRUSTED

    @property
    def _name(self) -> str:
        return f"mask policy {checks.name_of(self.mask_fn)}"

    def _chosen(self, iteration: int, on_device: Tensor) -> Tensor:
        """The mask (B, N) of a policy that makes its own choice."""
        choose = partial(self.mask_fn.choose, iteration=on_device, **self.counters)
        if self._is_trusted:
            return choose(self.free)
        with user_code.unwritten(self._name, free=self.free, iteration=on_device, chain_ids=self.counters["chain_ids"]):
            mask = user_code.call(self._name, iteration, choose, self.free)
        mask = arguments.patch_mask(self._name, mask, len(self.free), self.grid, self.free.device) & self.free
        self._note_excess((mask.sum(1) - self.sizes).amax())
        return mask

    def _note_excess(self, excess: Tensor) -> None:
        """Note how many patches too many a policy has chosen, at the most; looked at now, or in the end on a GPU."""
        first = self._excess is None
        self._excess = excess if first else torch.maximum(self._excess, excess)
        if first or excess.device.type == "cpu":
            self.verify()

    def _bound(self) -> MaskPolicy:
        """The policy for these samples. Raises ValueError where it does not fit them."""
        bound = self._ask("bind", self.grid, len(self.free), self.free.device)
        if not isinstance(bound, MaskPolicy):
            raise ValueError(f"{self._name}: bind must return a MaskPolicy, got {type(bound).__name__}")
        return bound

    def _sizes(self) -> Tensor:
        """The policy's numbers of patches (B,), within 0..N."""
        batch = len(self.free)
        with nullcontext() if self._is_trusted else user_code.unwritten(self._name, free=self.free):
            sizes = self._ask("sizes", self.free)
        if not isinstance(sizes, Tensor) or tuple(sizes.shape) != (batch,) or sizes.dtype != torch.int64:
            came = f"{tuple(sizes.shape)} of {sizes.dtype}" if isinstance(sizes, Tensor) else type(sizes).__name__
            raise ValueError(f"{self._name}: sizes must be an int64 tensor of shape ({batch},), got {came}")
        return sizes.clamp(0, self.grid.num_patches)

    def _ask(self, method: str, *args: object) -> object:
        """Call a method of the policy; whatever it raises comes back as a ValueError that names it."""
        try:
            return getattr(self.mask_fn, method)(*args)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{self._name}: {method} raised {type(error).__name__}: {error}") from error

    def freeze(self, chains: Tensor | None) -> bool:
        """Take the patches of frozen chains out of the free ones; True when no chain is left."""
        if chains is None:
            return False
        self.free = self.free & ~chains.to(self.free.device)[:, None]
        is_policy = isinstance(self.mask_fn, MaskPolicy)
        sizes = self._sizes() if is_policy else self.free.sum(1)
        both = torch.stack([sizes, self.free.sum(1)]).cpu()  # the one look at the data
        if is_policy and not torch.equal(both[0], self.counts):
            self.sizes, self.counts = sizes, both[0]
        return not bool(both[1].any())
