"""Images as patches, and the compact index of the patches that are being regenerated."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from ipr_fast.kernels.rows import compact, patch_rows


@dataclass(frozen=True)
class PatchGrid:
    """The division of an image (channels, height, width) into square patches.

    Patches are numbered row by row; the `P = channels * patch_size**2` numbers of a patch stand in the order
    (channel, row, column). That order is part of the definition of a chain's random numbers.

    Raises ValueError when the patch size does not divide height and width.
    """

    channels: int
    height: int
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "patch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(
                f"patch_size must divide height and width, got {self.patch_size} for {self.height}x{self.width}"
            )

    @property
    def grid_h(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch_size

    @property
    def grid_w(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the patches of one sample."""
        return self.grid_h * self.grid_w

    @property
    def patch_numel(self) -> int:
        """P, the numbers of one patch."""
        return self.channels * self.patch_size**2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    def to_patches(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) as patches (..., N, P)."""
        if images.ndim < 3 or tuple(images.shape[-3:]) != self.sample_shape:
            raise ValueError(f"images must be (..., {_join(self.sample_shape)}), got {tuple(images.shape)}")
        lead, s = images.shape[:-3], self.patch_size
        split = images.reshape(*lead, self.channels, self.grid_h, s, self.grid_w, s)
        d = len(lead)
        order = (*range(d), d + 1, d + 3, d, d + 2, d + 4)  # grid_h, grid_w, channel, row, column
        return split.permute(order).reshape(*lead, self.num_patches, self.patch_numel)

    def to_images(self, patches: Tensor) -> Tensor:
        """Patches (..., N, P) as images (..., C, H, W), the inverse of `to_patches`."""
        if patches.ndim < 2 or tuple(patches.shape[-2:]) != (self.num_patches, self.patch_numel):
            raise ValueError(
                f"patches must be (..., {self.num_patches}, {self.patch_numel}), got {tuple(patches.shape)}"
            )
        lead, s = patches.shape[:-2], self.patch_size
        split = patches.reshape(*lead, self.grid_h, self.grid_w, self.channels, s, s)
        d = len(lead)
        order = (*range(d), d + 2, d, d + 3, d + 1, d + 4)  # channel, grid_h, row, grid_w, column
        return split.permute(order).reshape(*lead, *self.sample_shape)


@dataclass(frozen=True)
class ActivePatches:
    """Which patches of each chain are being regenerated.

    `index` (B, A) int32 holds the patch ids in ascending order, then -1; `count` (B,) int32 their number. A, the number
    of slots, is a capacity chosen on the host: it never depends on the data of a batch.
    """

    index: Tensor
    count: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, slots: int | None = None) -> ActivePatches:
        """The active patches of a bool mask (B, N); `slots` (default N) must hold the largest count."""
        batch, num_patches = mask.shape
        slots = num_patches if slots is None else slots
        index = torch.empty(batch, slots, dtype=torch.int32, device=mask.device)
        count = torch.empty(batch, dtype=torch.int32, device=mask.device)
        active = cls(index, count)
        active.assign(mask)
        return active

    def assign(self, mask: Tensor) -> None:
        """Write the active patches of `mask` (B, N) into this object's own buffers."""
        compact(mask, self.index, self.count)

    def __getitem__(self, chains: slice) -> ActivePatches:
        """The active patches of some of the chains."""
        return ActivePatches(self.index[chains], self.count[chains])

    @property
    def occupied(self) -> Tensor:
        """(B, A) bool, False where a slot is padding."""
        return self.index >= 0

    def rows(self, num_patches: int) -> Tensor:
        """(B, A) int64 rows of the slots in a buffer (B * N + 1, ...); padding has the spare row B * N."""
        batch = self.index.shape[0]
        first = torch.arange(batch, device=self.index.device).mul_(num_patches)[:, None]
        return torch.where(self.occupied, self.index + first, batch * num_patches)

    def gather(self, values: Tensor) -> Tensor:
        """Values of all patches (B, N, ...) as values of the slots (B, A, ...); padding repeats patch 0."""
        rows = patch_rows(self.index, values.shape[1])
        return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def scatter(self, values: Tensor, num_patches: int, fill: float = 0.0) -> Tensor:
        """Values of the slots (B, A, ...) as values of all patches (B, N, ...), with `fill` for the others."""
        batch, slots = self.index.shape
        tail = values.shape[2:]
        out = values.new_full((batch * num_patches + 1, *tail), fill)
        out.index_copy_(0, self.rows(num_patches).flatten(), values.reshape(batch * slots, *tail))
        return out[:-1].reshape(batch, num_patches, *tail)


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
