"""The UNet of the published Spatial Reasoning Models (Wewer et al. 2025), as a Denoiser.

The published code embeds the noise level of every pixel in every block. Here, since levels are constant within a patch,
each patch's level is embedded once for all feature maps whose size is a multiple of the patch grid's, and the level 0
of the context once for all its patches. In coarser maps a pixel covers several patches: there, as published, levels are
resampled bilinearly and embedded for each pixel, once per resolution. Results are equal to float32 rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.models.deferred_bias import DeferredBiases, can_defer
from ipr_fast.models.level_embedding import PublishedLevelEmbedding
from ipr_fast.models.packed import PackedWeights
from ipr_fast.models.srm_unet_config import SRMUNetConfig
from ipr_fast.models.unet import ResBlock, UNet, Upsample
from ipr_fast.models.unet_biases import lacking_biases
from ipr_fast.models.unet_operations import LayerInputs, LevelMap
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Schedule

MAX_NUMEL = 2**31 - 1  # of a map on a GPU: with more, an operation may be slow or silently wrong


class LevelTable(NamedTuple):
    """What depends on levels (R,), ascending, or on weights alone.

    embeddings (R, t_emb_dim); projected: each ResBlock's projection (R, C) of them; packed: weights in a CPU's layout;
    biases: for a GPU.
    """

    levels: Tensor
    embeddings: Tensor
    projected: dict[nn.Module, Tensor]
    packed: PackedWeights
    biases: DeferredBiases


class SRMUNet(nn.Module):
    """A Denoiser for patches (B, N, P) of `config`'s grid.

    A large batch is computed in chunks: on a CPU so that the feature maps stay below `cpu_bytes`, as larger chunks are
    no faster; on a GPU so that no map has more than MAX_NUMEL numbers.
    """

    cpu_bytes = 256 * 2**20
    value_range = (-1.0, 1.0)  # of the samples that the published networks were trained on
    patch_dtype = torch.float32  # cast where the weights are of another type
    mix_bounds = (-1.0, 2.0)  # as published, the variance mix is neither bounded to [0, 1] by the network nor clipped

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        self.out_grid = PatchGrid.of((2 * config.channels + 1, *self.grid.sample_shape[1:]), self.grid.patch_shape)
        self.generate_schedule = Schedule(*config.generate_schedule)
        self.refine_schedule = Schedule(*config.refine_schedule)
        self.time_embedding = PublishedLevelEmbedding(
            config.d_emb, config.t_emb_dim, config.level_scale, config.level_shift
        )
        self.model = UNet(config)
        # torch's stub lacks memory_format.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None, *, table: LevelTable | None = None
    ) -> Prediction:
        """Predict all patches (levels (B, N)), or the active slots (levels (B, A)), every other patch being clean.

        table: from `tabulate`, of levels that include these and 0. It saves 5 % of the time with every patch active,
        1 to 2 % with a quarter of them (Even Pixels, 1 to 32 samples, one thread).
        """
        size = self._samples_at_once(patches.device)
        if len(patches) <= size:
            return self._predict(patches, levels, active, table)
        chunks = [slice(i, i + size) for i in range(0, len(patches), size)]
        predictions = [
            self._predict(patches[chunk], levels[chunk], None if active is None else active[chunk], table)
            for chunk in chunks
        ]
        return Prediction(*(torch.cat(field) for field in zip(*predictions, strict=True)))

    def tabulate(self, levels: Tensor, out: LevelTable | None = None) -> LevelTable:
        """Return the table of levels (R,), ascending from 0; written into `out`, if given."""
        embeddings = self.time_embedding(levels)
        projected: dict[nn.Module, Tensor] = {
            block: block.project(embeddings) for block in self.modules() if isinstance(block, ResBlock)
        }
        if out is None:
            out = LevelTable(levels.clone(), embeddings, projected, PackedWeights(), DeferredBiases())
        else:
            out.levels.copy_(levels)
            out.embeddings.copy_(embeddings)
            for block, rows in projected.items():
                out.projected.setdefault(block, rows).copy_(rows)
        out.packed.pack(self.model, (layer.conv for layer in self.modules() if isinstance(layer, Upsample)))
        out.biases.update(lacking_biases(self.model))
        return out

    def raw(
        self,
        images: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        table: LevelTable | None = None,
    ) -> Tensor:
        """Return the network's output (B, 2 C + 1, H, W) for images: velocity (C), mix (C), log-variance (1)."""
        images = images.to(self.model.dtype, memory_format=torch.channels_last)
        level_maps = self._level_maps(levels, active, table)
        if table is None:
            return self.model(images, LayerInputs(level_maps))
        biases = table.biases if table.biases and can_defer(images) else None
        return self.model(images, LayerInputs(level_maps, table.packed, biases))

    def _predict(
        self, patches: Tensor, levels: Tensor, active: ActivePatches | None, table: LevelTable | None
    ) -> Prediction:
        raw = self.out_grid.to_patches(self.raw(self.grid.to_images(patches), levels, active, table))
        if active is not None:
            raw = active.gather(raw)
        numel = self.grid.patch_numel
        velocity, mix, log_variance = raw.split((numel, numel, numel // self.config.channels), dim=-1)
        if self.config.mix == "halved":
            mix = torch.rsub(mix, 0.5, alpha=-0.5)  # (mix + 1) / 2
        return Prediction(velocity, mix, log_variance.mean(-1))

    def _level_maps(
        self, levels: Tensor, active: ActivePatches | None, table: LevelTable | None
    ) -> dict[tuple[int, int], LevelMap]:
        """Return the LevelMap of each size (H, W) of feature map."""
        num_patches = self.grid.num_patches
        if table is None:
            distinct, row = levels.flatten(), torch.arange(levels.numel(), device=levels.device).view(levels.shape)
            if active is not None:
                # One more row, of level 0, for the context.
                distinct = torch.cat([distinct, distinct.new_zeros(1)])
                row = active.scatter(row, num_patches, fill=levels.numel())
            embeddings = self.time_embedding(distinct)
        if active is not None:
            levels = active.scatter(levels, num_patches)
        if table is not None:
            embeddings, row = table.embeddings, torch.searchsorted(table.levels, levels)
        row = row.view(-1, *self.grid.grid_shape)
        by_patch = LevelMap(embeddings, row) if table is None else LevelMap(embeddings, row, table.projected)
        return {
            size: by_patch if self._has_whole_cells(size) else self._level_map_by_pixel(levels, size)
            for size in self.config.map_sizes
        }

    def _has_whole_cells(self, size: tuple[int, int]) -> bool:
        """Return whether each pixel of a map lies in one patch."""
        return all(side % count == 0 for side, count in zip(size, self.grid.grid_shape, strict=True))

    def _level_map_by_pixel(self, levels: Tensor, size: tuple[int, int]) -> LevelMap:
        """Return the LevelMap of a map whose pixels cover several patches: levels (B, N) resampled, as published."""
        down, across = self.grid.patch_shape
        level_map = levels.view(-1, 1, *self.grid.grid_shape)
        level_map = level_map.repeat_interleave(down, 2).repeat_interleave(across, 3)
        pixels = F.interpolate(level_map, size=size, mode="bilinear", align_corners=False).squeeze(1)
        row = torch.arange(pixels.numel(), device=levels.device).view(pixels.shape)
        return LevelMap(self.time_embedding(pixels.flatten()), row)

    def _samples_at_once(self, device: torch.device) -> int:
        if device.type != "cpu":
            return max(1, MAX_NUMEL // self.config.widest_numel)
        return max(1, self.cpu_bytes // (self.model.dtype.itemsize * self.config.map_numel))
