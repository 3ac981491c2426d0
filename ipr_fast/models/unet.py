"""The network of an SRMUNet: encoder, bottleneck and decoder, their parameters named as in the published checkpoints.

A ResBlock is told the noise level of every cell of its feature map, by an embedding that it projects to its channels
and adds: `h = GroupNorm(h + Linear(SiLU(e)))`. A cell is a square of pixels with one level. Feature maps (B, C, H, W)
are channels-last: a pixel's channels are one row, so convolutions of kernel 1 are matrix products, and attention reads
its tokens, with no copy of the map before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.modulated_norm import group_norm
from ipr_fast.models.packed import PackedWeights, convolution, doubled_convolution, pointwise
from ipr_fast.models.srm_unet_config import GROUPS, SRMUNetConfig
from ipr_fast.trace import span


class Condition(NamedTuple):
    """What the ResBlocks of one size of feature map are told of the levels.

    rows   (R, t_emb_dim)  SiLU of the embedding of R levels
    index  (B, h, w)       the row of each cell of the map
    """

    rows: Tensor
    index: Tensor


class Given(NamedTuple):
    """What a call brings for every layer: a Condition for each size of feature map, and packed weights."""

    conditions: dict[int, Condition]
    packed: PackedWeights | None = None


class UNet(nn.Module):
    """Images (B, C, H, W) to (B, 2 C + 1, H, W)."""

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.bottleneck = Bottleneck(config)
        self.decoder = Decoder(config, self.encoder.dims)

    def forward(self, images: Tensor, given: Given) -> Tensor:
        skips = self.encoder(images, given)
        return self.decoder(self.bottleneck(skips[-1], given), skips, given)


class Encoder(nn.Module):
    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        dim = config.hid_dims[0]
        self.blocks = nn.ModuleList([Stage(nn.Conv2d(config.channels, dim, 3, padding=1))])
        self.dims = [dim]  # channels of each stage's output
        for level, hid_dim in enumerate(config.hid_dims):
            if level:
                self.blocks.append(Stage(Downsample(dim)))
                self.dims.append(dim)
            for _ in range(config.num_blocks):
                self.blocks.append(Stage(*_blocks(config, level, dim)))
                self.dims.append(hid_dim)
                dim = hid_dim

    def forward(self, h: Tensor, given: Given) -> list[Tensor]:
        """The output of every stage."""
        skips = []
        for stage in self.blocks:
            h = stage(h, given)
            skips.append(h)
        return skips


class Bottleneck(nn.Module):
    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        dim, width = config.hid_dims[-1], config.t_emb_dim
        attention = Attention(dim, config.num_head_channels)
        self.blocks = Stage(ResBlock(dim, dim, width), attention, ResBlock(dim, dim, width))

    def forward(self, h: Tensor, given: Given) -> Tensor:
        return self.blocks(h, given)


class Decoder(nn.Module):
    def __init__(self, config: SRMUNetConfig, skip_dims: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        dim, skip_dims = skip_dims[-1], list(skip_dims)
        for level, hid_dim in reversed(list(enumerate(config.hid_dims))):
            for i in range(config.num_blocks + 1):
                layers = _blocks(config, level, dim + skip_dims.pop())
                if level and i == config.num_blocks:
                    layers.append(Upsample(hid_dim))
                self.blocks.append(Stage(*layers))
                dim = hid_dim
        self.out = norm_silu_conv(dim, 2 * config.channels + 1)

    def forward(self, h: Tensor, skips: list[Tensor], given: Given) -> Tensor:
        for stage in self.blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = stage(h, given, size=skips[-1].shape[2:] if skips else None)
        norm, _, conv = self.out
        return convolution(conv, norm_silu(norm, h), given.packed)


class Stage(nn.Sequential):
    """Layers in a row, each given what it needs."""

    def forward(self, h: Tensor, given: Given, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, given.conditions[h.shape[-1]], given.packed)
            elif isinstance(layer, Upsample):
                h = layer(h, size, given.packed)
            elif isinstance(layer, nn.Conv2d):
                h = convolution(layer, h, given.packed)
            else:
                h = layer(h, given.packed)
        return h


class ResBlock(nn.Module):
    def __init__(self, dim: int, out_dim: int, t_emb_dim: int) -> None:
        super().__init__()
        self.conv_1 = norm_silu_conv(dim, out_dim)
        self.norm_with_embedding = NormWithEmbedding(out_dim, t_emb_dim)
        # The published network has its dropout, which is for training only, in the place of the second.
        self.conv_2 = nn.Sequential(nn.SiLU(), nn.Identity(), nn.Conv2d(out_dim, out_dim, 3, padding=1))
        self.shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x: Tensor, condition: Condition, packed: PackedWeights | None = None) -> Tensor:
        (norm_1, _, conv_1), (_, _, conv_2) = self.conv_1, self.conv_2
        projected = self.norm_with_embedding.embedding_layer[1](condition.rows)
        h = convolution(conv_1, norm_silu(norm_1, x), packed)
        h = norm_silu(self.norm_with_embedding.norm, h, projected, condition.index)
        if self.shortcut is None:
            return convolution(conv_2, h, packed, plus=x)
        return convolution(conv_2, h, packed, onto=pointwise(self.shortcut, x, packed))


class NormWithEmbedding(nn.Module):
    """The parameters of a GroupNorm, and of the projection of what is added before it."""

    def __init__(self, dim: int, t_emb_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.embedding_layer = nn.Sequential(nn.SiLU(), nn.Linear(t_emb_dim, dim))  # a Condition's rows are after SiLU


class Attention(nn.Module):
    """Every pixel of the map attends to every other."""

    def __init__(self, dim: int, num_head_channels: int) -> None:
        super().__init__()
        self.num_heads, self.num_head_channels = dim // num_head_channels, num_head_channels
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.qkv = nn.Conv1d(dim, 3 * dim, 1)
        self.proj = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
        norm = self.norm
        normed = group_norm(x, norm.weight, norm.bias, groups=GROUPS, eps=norm.eps, silu=False)
        qkv = pointwise(self.qkv, normed, packed).permute(0, 2, 3, 1)
        heads = (self.num_heads, 3, self.num_head_channels)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, heads).permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        attended = attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return pointwise(self.proj, attended, packed).add_(x)


class Downsample(nn.Module):
    """Half the size, rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
        return convolution(self.downsample, x, packed)


class Upsample(nn.Module):
    """To the given size, by the nearest pixel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size, packed: PackedWeights | None = None) -> Tensor:
        return doubled_convolution(self.conv, x, size, packed)


def norm_silu_conv(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(GROUPS, dim), nn.SiLU(), nn.Conv2d(dim, out_dim, 3, padding=1))


def norm_silu(norm: nn.GroupNorm, h: Tensor, rows: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """GroupNorm and SiLU as one operation, after adding rows (R, C) to the cells of index (B, h, w), if given."""
    with span("group_norm"):
        return group_norm(h, norm.weight, norm.bias, groups=GROUPS, eps=norm.eps, rows=rows, index=index)


def _blocks(config: SRMUNetConfig, level: int, dim: int) -> list[nn.Module]:
    """A ResBlock of one resolution and, where it has one, the attention that follows."""
    hid_dim = config.hid_dims[level]
    attention = [Attention(hid_dim, config.num_head_channels)] if config.attention[level] else []
    return [ResBlock(dim, hid_dim, config.t_emb_dim), *attention]
