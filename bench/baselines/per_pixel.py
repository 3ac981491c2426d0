"""The SRM UNet by its published formula: a baseline of bench/bench_baselines.py.

Every ResBlock resamples the level map to its feature map and runs the embedding's MLP and projection on each pixel.
Maps are in torch's default layout, attention materialises its weights. The weights are those of an SRMUNet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast import ActivePatches
from ipr_fast.models import Prediction, SRMUNet
from ipr_fast.models.level_embedding import LevelEmbedding
from ipr_fast.models.unet import Attention, Downsample, ResBlock, Upsample


class PerPixelUNet(nn.Module):
    """A Denoiser with the results and weights of `model`, computed per pixel."""

    def __init__(self, model: SRMUNet) -> None:
        super().__init__()
        self.inner, self.grid = model, model.grid

    def forward(self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None) -> Prediction:
        if active is not None:
            levels = active.scatter(levels, self.grid.num_patches)
        level_map = self.grid.to_images(levels[..., None].expand_as(patches))[:, :1]
        raw = self.raw(self.grid.to_images(patches), level_map)
        channels = self.grid.channels
        velocity, mix, log_variance = raw.split((channels, channels, 1), dim=1)
        log_variance = log_variance.expand(-1, channels, -1, -1)  # the mean over a patch is unchanged
        prediction = Prediction(
            self.grid.to_patches(velocity),
            (self.grid.to_patches(mix) + 1) / 2,
            self.grid.to_patches(log_variance).mean(-1),
        )
        return prediction if active is None else prediction.at(active)

    def raw(self, images: Tensor, level_map: Tensor) -> Tensor:
        """Return (B, 2 C + 1, H, W) for images (B, C, H, W) and the level of each pixel (B, 1, H, W)."""
        network, embed = self.inner.model, self.inner.time_embedding
        h, skips = images, []
        for stage in network.encoder.blocks:
            h = _stage(stage, h, level_map, embed)
            skips.append(h)
        h = _stage(network.bottleneck.blocks, h, level_map, embed)
        for stage in network.decoder.blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = _stage(stage, h, level_map, embed, skips[-1].shape[2:] if skips else None)
        group_norm, _, conv = network.decoder.out
        return conv(F.silu(group_norm(h)))


def _stage(
    stage: nn.ModuleList, h: Tensor, level_map: Tensor, embed: LevelEmbedding, size: torch.Size | None = None
) -> Tensor:
    for layer in stage:
        if isinstance(layer, ResBlock):
            h = _res_block(layer, h, level_map, embed)
        elif isinstance(layer, Attention):
            h = _attention(layer, h)
        elif isinstance(layer, Upsample):
            h = layer.conv(F.interpolate(h, size=size, mode="nearest"))
        elif isinstance(layer, Downsample):
            h = layer.downsample(h)
        else:
            h = layer(h)
    return h


def _res_block(block: ResBlock, x: Tensor, level_map: Tensor, embed: LevelEmbedding) -> Tensor:
    group_norm, _, conv_1 = block.conv_1
    h = conv_1(F.silu(group_norm(x)))
    norm = block.norm_with_embedding
    levels = F.interpolate(level_map, size=h.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    half = embed.features // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=x.device) * -math.log(10000) / half)
    angle = (1000 * levels[..., None] - 1).clamp(min=0) * frequencies
    embedding = embed.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
    projected = norm.embedding_layer[1](F.silu(embedding)).permute(0, 3, 1, 2)
    shortcut = x if block.shortcut is None else block.shortcut(x)
    return block.conv_2[-1](F.silu(norm.norm(h + projected))) + shortcut


def _attention(layer: Attention, x: Tensor) -> Tensor:
    batch, channels, *size = x.shape
    x = x.reshape(batch, channels, -1)
    qkv = layer.qkv(layer.norm(x)).reshape(batch * layer.num_heads, -1, x.shape[-1])
    q, k, v = qkv.chunk(3, dim=1)
    scale = q.shape[1] ** -0.25
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    attended = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)
    return (x + layer.proj(attended)).reshape(batch, channels, *size)
