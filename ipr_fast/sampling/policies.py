"""Mask policies: rules, run on the device, for the patches that an iteration renoises.

`refine_batch` takes a policy or any callable `mask_fn(x, iteration)`. A policy chooses among each chain's free patches
and states in advance how many it chooses at most, so the host need not read the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels import philox
from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.sampling import user_code
from ipr_fast.sampling.arguments import patch_mask
from ipr_fast.sampling.patches import Positions
from ipr_fast.sampling.signals import Signals

LOWEST = torch.finfo(torch.float32).min


class MaskPolicy(ABC):
    """Base class of mask policies: tensor operations only, without host synchronisation.

    `bind` is called once a call of `refine_batch`, before the other two methods.

    varies: True for a policy that often chooses fewer patches than its `sizes`. The host then reads the number in every
    iteration, and a chain takes the steps for the patches that were chosen.
    """

    varies: ClassVar[bool] = False

    @abstractmethod
    def sizes(self, free: Tensor) -> Tensor:
        """Return the largest number of patches that `choose` can return for each chain: (B,) int64.

        free: (B, N) bool, the patches that may be chosen. Unless the policy varies a chain gets the steps for that many
        patches, so a patch beyond the number would not be denoised to the end.
        """

    @abstractmethod
    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        """Return the mask (B, N) bool of the patches to renoise.

        free: (B, N) bool. iteration: () int64. chain_ids: (B,) int64. The inputs must not be written to. A policy whose
        `choose` has an argument `x` or `signals` gets the samples (B, ...), or the `ipr_fast.Signals`, too.
        """

    def bind(self, grid: Positions, batch: int, device: torch.device) -> MaskPolicy:
        """Return the policy for `batch` samples of this grid. Raises ValueError when it does not fit them."""
        return self


@dataclass(frozen=True)
class SharePolicy(MaskPolicy):
    """A policy that chooses a share `ratio` of each chain's free patches, see `num_chosen`."""

    ratio: float
    size_of: Tensor | None = field(default=None, kw_only=True)  # (N + 1,) int64, set by `bind`: `num_chosen` of n free

    def __post_init__(self) -> None:
        if not _is_ratio(self.ratio):
            raise ValueError(f"ratio must be a number in (0, 1], got {self.ratio!r}")

    def bind(self, grid: Positions, batch: int, device: torch.device) -> SharePolicy:
        return replace(self, size_of=sizes_chosen(self.ratio, grid.num_patches, device))

    def sizes(self, free: Tensor) -> Tensor:
        assert self.size_of is not None, "bind is called before"
        return self.size_of[free.sum(1)]


@dataclass(frozen=True)
class RandomPatches(SharePolicy):
    """See `random_patches`."""

    fixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.boolean("fixed", self.fixed)

    def choice(self, free: Tensor, iteration: Tensor) -> PatchChoice:
        """Describe the choice among the free patches (B, N), for the engine to make."""
        if self.fixed:
            iteration = torch.zeros_like(iteration)  # the initial generation chooses no patches: its keys are unused
        return PatchChoice(free, self.sizes(free), iteration)

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        return choose_patches(self.choice(free, iteration), seed=seed, chain_ids=chain_ids)


@dataclass(frozen=True)
class SweepPatches(SharePolicy):
    """See `sweep_patches`."""

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        size = self.sizes(free).clamp_min(1)[:, None]  # 0 where nothing is free
        blocks = ((free.sum(1, keepdim=True) + size - 1) // size).clamp_min(1)
        sweep, block = (iteration - 1) // blocks, (iteration - 1) % blocks
        keys = philox.patch_keys(seed, philox.STREAM_POLICIES, sweep, chain_ids, free.shape[1])
        keys = torch.where(free, keys, philox.MAX_KEY + 1)
        place = keys.argsort(dim=1, stable=True).argsort(dim=1)  # ties by patch
        return free & (place // size == block)


@dataclass(frozen=True)
class UncertainPatches(SharePolicy):
    """See `uncertain_patches`."""

    def choose(
        self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor, signals: Signals | None = None
    ) -> Tensor:
        assert signals is not None, "asked for"
        keys = philox.patch_keys(seed, philox.STREAM_CHOICE, iteration, chain_ids, free.shape[1])
        uncertainty = signals.uncertainty.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=LOWEST)
        by_key = keys.argsort(dim=1, stable=True)  # ties, and what is not known, come in a random order
        uncertainty = uncertainty.masked_fill(~free, -torch.inf).gather(1, by_key)
        order = by_key.gather(1, uncertainty.argsort(dim=1, descending=True, stable=True))
        return free & (order.argsort(dim=1) < self.sizes(free)[:, None])


@dataclass(frozen=True)
class ViolatingPatches(SharePolicy):
    """See `violating_patches`."""

    varies: ClassVar[bool] = True

    judge: Callable[[Tensor], object] = field(kw_only=True)
    others: float = field(default=0.0, kw_only=True)
    grid: Positions | None = field(default=None, kw_only=True)  # set by `bind`

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("others", self.others, 0, 1)

    def bind(self, grid: Positions, batch: int, device: torch.device) -> ViolatingPatches:
        return replace(super().bind(grid, batch, device), grid=grid)  # type: ignore[return-value, call-arg]

    def sizes(self, free: Tensor) -> Tensor:
        return (super().sizes(free) + self.num_others(free)).minimum(free.sum(1))

    def num_others(self, free: Tensor) -> Tensor:
        """Return the largest number (B,) of patches beside those that violate."""
        return (self.others * free.sum(1)).long()

    def choose(
        self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor, x: Tensor | None = None
    ) -> Tensor:
        assert x is not None, "asked for"
        assert self.grid is not None, "bind is called before"
        name = f"violating_patches: {checks.name_of(self.judge)}"
        with torch.no_grad(), user_code.read_only(name, x=x):
            report = user_code.call(name, iteration, self.judge, x)
        if isinstance(report, tuple) and not hasattr(report, "violating_cells"):
            raise ValueError(f"{name}: its {type(report).__name__} has no violating_cells")
        found = getattr(report, "violating_cells", report)
        if isinstance(found, Tensor) and found is not report and found.ndim > 2:
            found = found.flatten(1)  # cells of a board are positions of a sequence of tokens
        found = patch_mask(name, found, len(x), self.grid, free.device)
        violating = free & found
        chosen = choose_patches(PatchChoice(violating, super().sizes(free), iteration), seed=seed, chain_ids=chain_ids)
        if not self.others:
            return chosen
        rest = PatchChoice(free & ~found & violating.any(1, keepdim=True), self.num_others(free), iteration)
        return chosen | choose_patches(rest, seed=seed, chain_ids=chain_ids)


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

    mask: Tensor  # bool mask or int64 patch ids; after `bind`, (B, N) bool on the device

    def sizes(self, free: Tensor) -> Tensor:
        return (free & self.mask).sum(1)

    def choose(self, free: Tensor, *, seed: int, iteration: Tensor, chain_ids: Tensor) -> Tensor:
        return free & self.mask

    def bind(self, grid: Positions, batch: int, device: torch.device) -> FixedPatches:
        n, plane = grid.num_patches, tuple(grid.grid_shape)
        mask = self.mask if self.mask.dtype == torch.bool else _mask_of_ids(self.mask, n)
        shapes = tuple(dict.fromkeys([(n,), plane, (batch, n), (batch, *plane)]))
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"fixed_patches: the mask must have one of the shapes {shapes}, got {tuple(mask.shape)}")
        return replace(self, mask=mask.reshape(-1, n).expand(batch, n).to(device, copy=True))


def random_patches(ratio: float = 0.25, *, fixed: bool = False) -> MaskPolicy:
    """Choose a random subset of each chain's free patches, of size max(1, floor(ratio * free)), in every iteration.

    ratio: in (0, 1]; 0.25 is the setting of Kang et al. 2026. The choice depends on seed, chain id and iteration alone.
    fixed: choose once for each chain, and renoise the same patches in every iteration.
    """
    return RandomPatches(ratio, fixed)


def sweep_patches(ratio: float = 0.25) -> MaskPolicy:
    """Choose every free patch once a sweep: each iteration takes the next block of a random order.

    A block has max(1, floor(ratio * free)) patches of a chain, the last one of a sweep those that are left; a sweep
    takes ceil(free / block) iterations. ratio: in (0, 1]. Each chain has its own order, a new one for each sweep, which
    depends on seed, chain id and the number of the sweep alone.
    """
    return SweepPatches(ratio)


def uncertain_patches(ratio: float = 0.25) -> MaskPolicy:
    """Choose each chain's most uncertain patches, by the model's own signal: max(1, floor(ratio * free)) of them.

    The signal is `ipr_fast.Signals.uncertainty`: of patches the predicted log-variance, of tokens -log p. Patches that
    a call has not regenerated yet have none and come first, in random order, so that the first iteration chooses those
    of `random_patches(ratio)`. ratio: in (0, 1]. A model of patches that predicts no log-variance is a ValueError.
    """
    return UncertainPatches(ratio)


def violating_patches(judge: object, ratio: float = 0.25, *, others: float = 0.0) -> MaskPolicy:
    """Choose patches that take part in a violation: at most max(1, floor(ratio * free)) random ones of those.

    judge: a task of `ipr_fast.tasks` whose reports have `violating_cells`, or a function of the samples (B, ...) that
        returns such a report or a bool mask, (B, N) or (B, *grid_shape), True = violating.
    ratio: in (0, 1]; 1 chooses all of them, in iterations as long as a generation.
    others: in [0, 1]; floor(others * free) random patches of the rest are chosen beside them.

    A chain without violations keeps its sample, and takes no steps. Random numbers are those of `random_patches`. The
    host reads the numbers of patches, once an iteration.
    """
    judge = judge.judge() if hasattr(judge, "judge") and not isinstance(judge, type) else judge
    if isinstance(judge, type) or not callable(judge):
        raise ValueError(f"judge must be a task or a function of samples, got {checks.instance_or_class(judge)}")
    return ViolatingPatches(ratio, judge=judge, others=others)


def num_chosen(ratio: float, free: int) -> int:
    """Return the number of patches that `random_patches(ratio)` chooses of `free` ones."""
    return max(1, math.floor(ratio * free)) if free else 0


def sizes_chosen(ratio: float, num_patches: int, device: torch.device | str) -> Tensor:
    """Return `num_chosen` of every number of free patches from 0 to N: (N + 1,) int64."""
    return torch.tensor([num_chosen(ratio, n) for n in range(num_patches + 1)], device=device)


def fixed_patches(patches: Tensor | Sequence[int]) -> MaskPolicy:
    """Choose the same patches in every iteration, as far as they are free.

    patches: a bool mask (N,), grid_shape, (B, N) or (B, *grid_shape), or a sequence of patch ids; a tensor, an array or
    a list.
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
    """Choose every free patch, so that each iteration regenerates from noise: the control for the compute spent."""
    return AllPatches()


def _is_ratio(value: object) -> bool:
    return 0 < checks.as_float(value) <= 1


def _mask_of_ids(ids: Tensor, num_patches: int) -> Tensor:
    """Turn patch ids (K,) into a mask (N,) bool on the CPU. Raises ValueError for ids out of range or repeated."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_patches:
        raise ValueError(f"fixed_patches: patch ids must lie in 0..{num_patches - 1}, got {ids.tolist()}")
    if len(ids.unique()) < ids.numel():
        raise ValueError(f"fixed_patches: patch ids must differ, got {ids.tolist()}; a mask must be bool")
    return torch.zeros(num_patches, dtype=torch.bool, device="cpu").index_fill_(0, ids.cpu(), True)
