"""Samples as patches, and the compact index of the patches that are being regenerated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.rows import compact, patch_rows


class Positions(Protocol):
    """What masks are masks of: N patches of P numbers each, or N tokens, laid out in `grid_shape`."""

    @property
    def num_patches(self) -> int: ...

    @property
    def patch_numel(self) -> int: ...

    @property
    def grid_shape(self) -> tuple[int, ...]: ...


class Grid(Positions, Protocol):
    """A division of samples into patches; `PatchGrid` is one, and a model may bring another.

    sample_shape: of a sample, without the batch. num_patches: N = prod(grid_shape). patch_numel: P, with
    N P = prod(sample_shape). `to_patches` turns samples (..., *sample_shape) into patches (..., N, P), `to_images` is
    its inverse; both move numbers and change none.
    """

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    def to_patches(self, images: Tensor, /) -> Tensor: ...

    def to_images(self, patches: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, init=False, repr=False)
class PatchGrid:
    """The division of sequences, images or video into patches of equal shape.

    `PatchGrid(channels, height, width, patch_size)` divides images; patch_size is an int, or a patch's height and
    width. `PatchGrid.of(sample_shape, patch_shape)` divides samples (C, L), (C, H, W) or (C, T, H, W) into patches of
    as many spatial sizes.

    Patches are numbered with the last dimension fastest, those of images row by row; the values of a patch are in the
    order (channel, *position): channel, row, column. A chain's random numbers depend on both orders.

    Raises ValueError when a patch's size does not divide the sample's.
    """

    sample_shape: tuple[int, ...]
    patch_shape: tuple[int, ...]

    def __init__(self, channels: int, height: int, width: int, patch_size: int | Sequence[int]) -> None:
        shape = (
            checks.integer("channels", channels, 1),
            checks.integer("height", height, 1),
            checks.integer("width", width, 1),
        )
        self._set(shape, patch_sides("patch_size", patch_size, shape[1:]))

    @classmethod
    def of(cls, sample_shape: Sequence[int], patch_shape: int | Sequence[int]) -> PatchGrid:
        """Return the grid of samples (C, L), (C, H, W) or (C, T, H, W) in patches (l,), (h, w) or (t, h, w).

        patch_shape: an int for patches of this size in every spatial dimension.
        """
        shape = checks.sizes("sample_shape", sample_shape)
        if len(shape) not in (2, 3, 4):
            raise ValueError(f"sample_shape must be (C, L), (C, H, W) or (C, T, H, W), got {shape}")
        grid = cls.__new__(cls)
        grid._set(shape, patch_sides("patch_shape", patch_shape, shape[1:]))
        return grid

    def _set(self, sample_shape: tuple[int, ...], patch_shape: tuple[int, ...]) -> None:
        object.__setattr__(self, "sample_shape", sample_shape)
        object.__setattr__(self, "patch_shape", patch_shape)

    def __repr__(self) -> str:
        return f"PatchGrid.of({self.sample_shape}, {self.patch_shape})"

    @property
    def channels(self) -> int:
        """C, the values of a pixel, frame or element."""
        return self.sample_shape[0]

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Patches along each spatial dimension."""
        return tuple(size // side for size, side in zip(self.sample_shape[1:], self.patch_shape, strict=True))

    @property
    def num_patches(self) -> int:
        """N, the number of patches in a sample."""
        return math.prod(self.grid_shape)

    @property
    def patch_numel(self) -> int:
        """P, the number of values in a patch."""
        return self.channels * math.prod(self.patch_shape)

    @property
    def height(self) -> int:
        """Height of an image."""
        return self._of_images("height").sample_shape[1]

    @property
    def width(self) -> int:
        """Width of an image."""
        return self._of_images("width").sample_shape[2]

    @property
    def grid_h(self) -> int:
        """Rows of an image's patches."""
        return self._of_images("grid_h").grid_shape[0]

    @property
    def grid_w(self) -> int:
        """Columns of an image's patches."""
        return self._of_images("grid_w").grid_shape[1]

    @property
    def patch_size(self) -> int:
        """The size of a patch in every spatial dimension. Raises ValueError if they differ; see `patch_shape`."""
        if len(set(self.patch_shape)) != 1:
            raise ValueError(f"patch_size: the sizes of patches {self.patch_shape} differ; use patch_shape")
        return self.patch_shape[0]

    def to_patches(self, images: Tensor) -> Tensor:
        """Split samples (..., *sample_shape) into patches (..., N, P)."""
        dims = len(self.patch_shape)
        if images.ndim <= dims or tuple(images.shape[-1 - dims :]) != self.sample_shape:
            name, expected = "images" if dims == 2 else "samples", ", ".join(map(str, self.sample_shape))
            raise ValueError(f"{name} must be (..., {expected}), got {tuple(images.shape)}")
        lead = images.shape[: -1 - dims]
        sizes = chain(*zip(self.grid_shape, self.patch_shape, strict=True))
        split = images.reshape(*lead, self.channels, *sizes)
        d = len(lead)
        which, within = (range(d + first, d + 1 + 2 * dims, 2) for first in (1, 2))
        return split.permute(*range(d), *which, d, *within).reshape(*lead, self.num_patches, self.patch_numel)

    def to_images(self, patches: Tensor) -> Tensor:
        """Join patches (..., N, P) into samples (..., *sample_shape), the inverse of `to_patches`."""
        if patches.ndim < 2 or tuple(patches.shape[-2:]) != (self.num_patches, self.patch_numel):
            raise ValueError(
                f"patches must be (..., {self.num_patches}, {self.patch_numel}), got {tuple(patches.shape)}"
            )
        lead, dims = patches.shape[:-2], len(self.patch_shape)
        split = patches.reshape(*lead, *self.grid_shape, self.channels, *self.patch_shape)
        d = len(lead)
        pairs = chain(*zip(range(d, d + dims), range(d + dims + 1, d + 2 * dims + 1), strict=True))
        return split.permute(*range(d), d + dims, *pairs).reshape(*lead, *self.sample_shape)

    def _of_images(self, name: str) -> PatchGrid:
        if len(self.patch_shape) != 2:
            raise ValueError(f"{name}: samples {self.sample_shape} are not images (C, H, W); see grid_shape")
        return self


def patch_sides(name: str, value: int | Sequence[int], spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Return a patch's size in every spatial dimension, from one int or a sequence; each divides the sample's."""
    each = isinstance(value, Sequence)
    sides = checks.sizes(name, value) if each else (checks.integer(name, value, 1),) * len(spatial)
    sizes = " x ".join(map(str, spatial))
    if len(sides) != len(spatial):
        raise ValueError(f"{name} must be an int or {len(spatial)} of them, for samples of {sizes}, got {value!r}")
    if any(size % side for size, side in zip(spatial, sides, strict=True)):
        raise ValueError(f"{name} must divide the spatial sizes {sizes} of samples, got {value}")
    return sides


@dataclass(frozen=True)
class ActivePatches:
    """The patches of each chain that are being regenerated, as a compact index.

    index  (B, A) int32: patch ids in ascending order, then -1 in the padding slots
    count  (B,) int32: number of active patches
    whole  the host knows that every patch of every chain is active: there is no context
    wanted (B, W) int64: the slots whose tokens are still to be drawn, where the host knows how many; a model of tokens
           may return the logits (B, W, V) of these alone. None: all slots

    The number of slots A is a capacity chosen on the host; it never depends on the data of a batch.
    """

    index: Tensor
    count: Tensor
    whole: bool = False
    wanted: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, slots: int | None = None) -> ActivePatches:
        """Index the patches of a bool mask (B, N); `slots`, by default N, must be at least the largest count."""
        batch, num_patches = mask.shape
        slots = num_patches if slots is None else slots
        index = torch.empty(batch, slots, dtype=torch.int32, device=mask.device)
        count = torch.empty(batch, dtype=torch.int32, device=mask.device)
        compact(mask, index, count)
        return cls(index, count)

    def __getitem__(self, chains: slice) -> ActivePatches:
        """Return the active patches of a slice of the chains."""
        return ActivePatches(self.index[chains], self.count[chains])

    def narrowed(self) -> ActivePatches:
        """Return the wanted slots as the only ones; the others' ids may stand behind those of a row with fewer."""
        return self if self.wanted is None else ActivePatches(self.index.gather(1, self.wanted), self.count)

    @property
    def occupied(self) -> Tensor:
        """(B, A) bool, False in padding slots."""
        return self.index >= 0

    def rows(self, num_patches: int) -> Tensor:
        """Return the row of each slot, (B, A) int64, in a buffer (B * N + 1, ...); padding gets the spare row B * N."""
        batch = self.index.shape[0]
        first = torch.arange(batch, device=self.index.device).mul_(num_patches)[:, None]
        return torch.where(self.occupied, self.index + first, batch * num_patches)

    def gather(self, values: Tensor) -> Tensor:
        """Gather values of all patches (B, N, ...) to the slots (B, A, ...); padding repeats patch 0."""
        rows = patch_rows(self.index, values.shape[1])
        return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def scatter(self, values: Tensor, num_patches: int, fill: float = 0.0) -> Tensor:
        """Scatter values of the slots (B, A, ...) to all patches (B, N, ...), with `fill` in inactive patches."""
        batch, slots = self.index.shape
        tail = values.shape[2:]
        out = values.new_full((batch * num_patches + 1, *tail), fill)
        out.index_copy_(0, self.rows(num_patches).flatten(), values.reshape(batch * slots, *tail))
        return out[:-1].reshape(batch, num_patches, *tail)


def waiting_slots(active: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return the levels (B, A) float32 and starts (B, A) int32 of active patches (B, N) bool before the first step."""
    index = ActivePatches.from_mask(active, slots)
    return index.occupied.float(), torch.full_like(index.index, -1)
