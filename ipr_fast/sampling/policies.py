"""Mask policies: which patches an iteration renoises, decided on the device.

`refine_batch` takes these or any callable `mask_fn(x, iteration)`. A policy chooses among each chain's free patches and
tells in advance how many it can choose at the most, so the engine needs no look at the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.sampling.patches import PatchGrid


class MaskPolicy(ABC):
    """A rule made of tensor operations, with no host round trip; `bind` comes before the other two."""

    @abstractmethod
    def sizes(self, free: Tensor) -> Tensor:
        """(B,) int64: how many patches the rule chooses, at most, given the free ones (B, N) bool.

        A chain gets the steps for so many: with more patches than that, some would not be denoised to the end.
        """

    @abstractmethod
    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        """The mask (B, N) bool of the patches to renoise; `iteration` is a scalar tensor."""

    def bind(self, grid: PatchGrid, batch: int, device: torch.device) -> MaskPolicy:
        """The policy for these samples. Raises ValueError when it does not fit them."""
        return self


@dataclass(frozen=True)
class RandomPatches(MaskPolicy):
    """See `random_patches`."""

    ratio: float
    fixed: bool = False
    size_of: Tensor | None = None  # (N + 1,) how many of n free patches are chosen; on the device, made by `bind`

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be a number in (0, 1], got {self.ratio!r}")
        if not isinstance(self.fixed, bool):
            raise ValueError(f"fixed must be a bool, got {self.fixed!r}")

    def bind(self, grid: PatchGrid, batch: int, device: torch.device) -> RandomPatches:
        sizes = [0, *(max(1, math.floor(self.ratio * n)) for n in range(1, grid.num_patches + 1))]
        return replace(self, size_of=torch.tensor(sizes, device=device))

    def sizes(self, free: Tensor) -> Tensor:
        return self.size_of[free.sum(1)]

    def choice(self, free: Tensor, iteration: Tensor) -> PatchChoice:
        """The choice among the free patches (B, N), for the engine to make."""
        if self.fixed:
            iteration = torch.zeros_like(iteration)  # the initial generation chooses no patches: its keys are unused
        return PatchChoice(free, self.sizes(free), iteration)

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        return choose_patches(self.choice(free, iteration), seed=seed, chain_ids=chain_ids)


@dataclass(frozen=True)
class AllPatches(MaskPolicy):
    """See `all_patches`."""

    def sizes(self, free: Tensor) -> Tensor:
        return free.sum(1)

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        return free


@dataclass(frozen=True, eq=False)
class FixedPatches(MaskPolicy):
    """See `fixed_patches`."""

    mask: Tensor

    def sizes(self, free: Tensor) -> Tensor:
        return (free & self.mask).sum(1)

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        return free & self.mask

    def bind(self, grid: PatchGrid, batch: int, device: torch.device) -> FixedPatches:
        n, plane = grid.num_patches, (grid.grid_h, grid.grid_w)
        if self.mask.dtype != torch.bool:  # patch ids
            if self.mask.numel() and not 0 <= int(self.mask.min()) <= int(self.mask.max()) < n:
                raise ValueError(f"fixed_patches: patch ids must lie in 0..{n - 1}, got {self.mask.tolist()}")
            if len(self.mask.unique()) < self.mask.numel():
                raise ValueError(f"fixed_patches: patch ids must differ, got {self.mask.tolist()}; a mask must be bool")
            mask = torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, self.mask.cpu(), True)
        else:
            mask = self.mask
        shapes = ((n,), plane, (batch, n), (batch, *plane))
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"fixed_patches: the mask must have one of the shapes {shapes}, got {tuple(mask.shape)}")
        return replace(self, mask=mask.reshape(-1, n).expand(batch, n).to(device, copy=True))


def random_patches(ratio: float = 0.25, *, fixed: bool = False) -> MaskPolicy:
    """A random subset of each chain's free patches, of size max(1, floor(ratio * free)), a fresh one every iteration.

    ratio: in (0, 1]; 0.25 is the setting of Kang et al. 2026. The choice depends on seed, chain id and iteration alone.
    fixed: choose once for each chain, and renoise the same patches every iteration.
    """
    return RandomPatches(ratio, fixed)


def fixed_patches(patches: Tensor | Sequence[int]) -> MaskPolicy:
    """The same patches every iteration.

    patches: a bool mask (N,), (grid_h, grid_w), (B, N) or (B, grid_h, grid_w), or a sequence of patch ids; a tensor, an
    array or a list. Known patches are left out.
    """
    try:
        mask = patches if isinstance(patches, Tensor) else torch.as_tensor(patches, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"patches must be a bool mask or patch ids, got {patches!r}") from error
    if mask.dtype == torch.bool:
        return FixedPatches(mask)
    if mask.numel() and (mask.ndim != 1 or mask.is_floating_point() or mask.is_complex()):
        raise ValueError(f"patches must be a bool mask or patch ids, got {tuple(mask.shape)} of {mask.dtype}")
    return FixedPatches(mask.long())


def all_patches() -> MaskPolicy:
    """Every free patch: each iteration starts again from noise. The control that tells refinement from mere compute."""
    return AllPatches()
