"""Images as patches, and the compact index of the patches that are being regenerated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.rows import compact, patch_rows


@dataclass(frozen=True)
class PatchGrid:
    """The division of images (channels, height, width) into square patches.

    Patches are numbered row by row; the `P = channels * patch_size**2` values of a patch are in the order (channel,
    row, column). A chain's random numbers depend on both orders.

    Raises ValueError when the patch size does not divide height and width.
    """

    channels: int
    height: int
    width: int
    patch_size: int

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "patch_size"):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), 1))
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(
                f"patch_size must divide height and width, got {self.patch_size} for {self.height}x{self.width}"
            )

    @property
    def grid_h(self) -> int:
        """Rows of patches."""
        return self.height // self.patch_size

    @property
    def grid_w(self) -> int:
        """Columns of patches."""
        return self.width // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the number of patches in a sample."""
        return self.grid_h * self.grid_w

    @property
    def patch_numel(self) -> int:
        """P, the number of values in a patch."""
        return self.channels * self.patch_size**2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    def to_patches(self, images: Tensor) -> Tensor:
        """Split images (..., C, H, W) into patches (..., N, P)."""
        if images.ndim < 3 or tuple(images.shape[-3:]) != self.sample_shape:
            expected = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"images must be (..., {expected}), got {tuple(images.shape)}")
        lead, s = images.shape[:-3], self.patch_size
        split = images.reshape(*lead, self.channels, self.grid_h, s, self.grid_w, s)
        d = len(lead)
        order = (*range(d), d + 1, d + 3, d, d + 2, d + 4)  # grid_h, grid_w, channel, row, column
        return split.permute(order).reshape(*lead, self.num_patches, self.patch_numel)

    def to_images(self, patches: Tensor) -> Tensor:
        """Join patches (..., N, P) into images (..., C, H, W), the inverse of `to_patches`."""
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
