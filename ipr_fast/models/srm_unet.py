"""The UNet of the published Spatial Reasoning Models (Wewer et al. 2025), as a Denoiser.

The published code embeds the noise level of every pixel, in every block. Levels are constant within a patch. So here
they are embedded for each patch, once for all feature maps that are a whole multiple of the patch grid; those of
patches that are not active, which are all 0, only once. Coarser maps, in which a pixel covers parts of several patches,
take the levels resampled bilinearly and embedded pixel by pixel, once a resolution. The numbers are the same to float32
rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.models.config_checks import square_grid
from ipr_fast.models.packed import PackedWeights
from ipr_fast.models.srm_unet_config import SRMUNetConfig
from ipr_fast.models.unet import Condition, Given, UNet, Upsample
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Schedule

MOST_NUMEL = 2**31 - 1  # of a map on a GPU: beyond, an operation may be slow, or wrong in silence


class LevelTable(NamedTuple):
    """The embeddings (R, t_emb_dim) of levels (R,), ascending; and the weights as the device likes them."""

    levels: Tensor
    rows: Tensor
    packed: PackedWeights


class SRMUNet(nn.Module):
    """A Denoiser for patches (B, N, P) of `config`'s grid; see the module's text.

    It takes a large batch in parts: on a CPU so that its maps stay within `cpu_bytes`, as a part of that size runs
    as fast as a larger one; on a GPU so that 32 bits can count the numbers of each.
    """

    cpu_bytes = 256 * 2**20
    value_range = (-1.0, 1.0)  # of the samples that the published networks were trained on
    mix_bounds = (-1.0, 2.0)  # the network does not bound its variance mix to [0, 1], and is not clipped, as published

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = square_grid(config.channels, config.image_size, config.patch_size)
        self.out_grid = PatchGrid(2 * config.channels + 1, config.image_size, config.image_size, config.patch_size)
        self.generate_schedule = Schedule(*config.generate_schedule)
        self.refine_schedule = Schedule(*config.refine_schedule)
        self.time_embedding = LevelEmbedding(config.d_emb, config.t_emb_dim)
        self.model = UNet(config)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None, *, table: LevelTable | None = None
    ) -> Prediction:
        """Predict all patches (levels (B, N)), or the active slots (levels (B, A)), every other patch being clean.

        `table` from `tabulate`, of levels among which these and 0 are, saves embedding them: 5 % of the time with every
        patch active, 1 to 2 % with a quarter (Even Pixels, 1 to 32 samples, one thread).
        """
        size = self._samples_at_once(patches.device)
        if len(patches) <= size:
            return self._predict(patches, levels, active, table)
        parts = [slice(i, i + size) for i in range(0, len(patches), size)]
        predictions = [
            self._predict(patches[part], levels[part], None if active is None else active[part], table)
            for part in parts
        ]
        return Prediction(*(torch.cat(field) for field in zip(*predictions, strict=True)))

    def tabulate(self, levels: Tensor, out: LevelTable | None = None) -> LevelTable:
        """The embeddings of levels (R,), ascending from 0."""
        rows = self.time_embedding(levels)
        if out is None:
            out = LevelTable(levels.clone(), rows, PackedWeights())
        else:
            out.levels.copy_(levels)
            out.rows.copy_(rows)
        upsamples = (layer for layer in self.modules() if isinstance(layer, Upsample))
        out.packed.pack(self.model, doubling=(layer.conv for layer in upsamples))
        return out

    def raw(
        self,
        images: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        table: LevelTable | None = None,
    ) -> Tensor:
        """The network's output for images (B, C, H, W): (B, 2 C + 1, H, W), velocity, 2 v - 1 and log-variance."""
        dtype = self.model.decoder.out[-1].weight.dtype
        images = images.to(dtype, memory_format=torch.channels_last)
        packed = None if table is None else table.packed
        return self.model(images, Given(self._conditions(levels, active, table), packed))

    def _predict(
        self, patches: Tensor, levels: Tensor, active: ActivePatches | None, table: LevelTable | None
    ) -> Prediction:
        raw = self.out_grid.to_patches(self.raw(self.grid.to_images(patches), levels, active, table))
        if active is not None:
            raw = active.gather(raw)
        numel = self.grid.patch_numel
        velocity, mix, log_variance = raw.split((numel, numel, self.config.patch_size**2), dim=-1)
        return Prediction(velocity, (mix + 1) / 2, log_variance.mean(-1))

    def _conditions(
        self, levels: Tensor, active: ActivePatches | None, table: LevelTable | None
    ) -> dict[int, Condition]:
        """For each size of feature map, the embedded levels and which of them each cell has."""
        grid_size, num_patches = self.grid.grid_h, self.grid.num_patches
        if table is None:
            distinct, row = levels.flatten(), torch.arange(levels.numel(), device=levels.device).view(levels.shape)
            if active is not None:
                # One more row, of level 0, for all patches that are not active.
                distinct = torch.cat([distinct, distinct.new_zeros(1)])
                row = active.scatter(row, num_patches, fill=levels.numel())
            rows = self.time_embedding(distinct)
        if active is not None:
            levels = active.scatter(levels, num_patches)
        if table is not None:
            rows, row = table.rows, torch.searchsorted(table.levels, levels)
        of_patches = Condition(rows, row.view(-1, grid_size, grid_size))
        return {
            size: of_patches if size % grid_size == 0 else self._condition_of_pixels(levels, size)
            for size in self.config.map_sizes
        }

    def _condition_of_pixels(self, levels: Tensor, size: int) -> Condition:
        """For a map in which pixels cover parts of several patches: the levels (B, N) resampled, as published."""
        patch_size = self.config.patch_size
        level_map = levels.view(-1, 1, self.grid.grid_h, self.grid.grid_w)
        level_map = level_map.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        pixels = F.interpolate(level_map, size=(size, size), mode="bilinear", align_corners=False).squeeze(1)
        row = torch.arange(pixels.numel(), device=levels.device).view(pixels.shape)
        return Condition(self.time_embedding(pixels.flatten()), row)

    def _samples_at_once(self, device: torch.device) -> int:
        if device.type != "cpu":
            return max(1, MOST_NUMEL // self.config.widest_numel)
        bytes_per_number = self.model.decoder.out[-1].weight.element_size()
        return max(1, self.cpu_bytes // (bytes_per_number * self.config.map_numel))


class LevelEmbedding(nn.Module):
    """Sinusoidal features of levels (R,), then a small MLP, then SiLU, with which every user of it would begin.

    The features are of 1000 t - 1, at least 0: levels as the 1000 discrete steps, counted from 0, of older diffusion
    models. So the published code has it.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, levels: Tensor) -> Tensor:
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=levels.device) * -math.log(10000) / half
        angle = (1000 * levels.float()[:, None] - 1).clamp(min=0) * exponent.exp()
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return F.silu(self.mlp(features.to(self.mlp[0].weight.dtype)))
