"""The network of an SRMUNet: encoder, bottleneck and decoder, with the published checkpoints' parameter names.

A ResBlock adds the embedded noise level of each cell to its feature map: `h = GroupNorm(h + Linear(SiLU(e)))`. A cell
is a square of pixels of equal level. Feature maps (B, C, H, W) are channels-last, so that 1x1 convolutions are matrix
products and attention reads pixels as tokens, without copying the map.

On a GPU most of the time goes into reading and writing maps. There convolutions leave out their biases, which the next
norms and sums add (deferred_bias.py); skips are not concatenated, but read by the norm and the shortcut from where they
are; and sums of matrix products are made by the products.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.map_sum import map_sum
from ipr_fast.kernels.scaled_attention import scaled_attention
from ipr_fast.models import packed
from ipr_fast.models.deferred_bias import add_pointwise, without_bias
from ipr_fast.models.packed import pointwise, upsampled_convolution
from ipr_fast.models.srm_unet_config import GROUPS, SRMUNetConfig
from ipr_fast.models.unet_operations import LayerInputs, completed, convolution, normalise


class UNet(nn.Module):
    """The published UNet, from images (B, C, H, W) to (B, 2 C + 1, H, W)."""

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.bottleneck = Bottleneck(config)
        self.decoder = Decoder(config, self.encoder.dims)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, inputs: LayerInputs) -> Tensor:
        skips = self.encoder(images, inputs)
        return self.decoder(self.bottleneck(skips[-1], inputs), skips, inputs)


class Encoder(nn.Module):
    """A convolution, then for each resolution its ResBlocks, with a downsampling stage in between."""

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        dim = config.hid_dims[0]
        self.blocks = nn.ModuleList([Stage([nn.Conv2d(config.channels, dim, 3, padding=1)])])
        self.dims = [dim]  # channels of each stage's output
        for level, hid_dim in enumerate(config.hid_dims):
            if level:
                self.blocks.append(Stage([Downsample(dim)]))
                self.dims.append(dim)
            for _ in range(config.num_blocks):
                self.blocks.append(Stage(_blocks(config, level, dim)))
                self.dims.append(hid_dim)
                dim = hid_dim

    def forward(self, h: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Return the output of every stage."""
        skips = []
        for stage in self.blocks:
            h = stage(h, inputs)
            skips.append(h)
        return skips


class Bottleneck(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest resolution."""

    def __init__(self, config: SRMUNetConfig) -> None:
        super().__init__()
        dim, width = config.hid_dims[-1], config.t_emb_dim
        attention = Attention(dim, config.num_head_channels)
        self.blocks = Stage([ResBlock(dim, dim, width), attention, ResBlock(dim, dim, width)])

    def forward(self, h: Tensor, inputs: LayerInputs) -> Tensor:
        return self.blocks(h, inputs)


class Decoder(nn.Module):
    """Per resolution, coarsest first: ResBlocks of the map concatenated with a skip, upsampling; then output layers.

    skip_dims: channels of the encoder's stages.
    """

    def __init__(self, config: SRMUNetConfig, skip_dims: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        dim, skip_dims = skip_dims[-1], list(skip_dims)
        for level, hid_dim in reversed(list(enumerate(config.hid_dims))):
            for i in range(config.num_blocks + 1):
                layers = _blocks(config, level, dim + skip_dims.pop())
                if level and i == config.num_blocks:
                    layers.append(Upsample(hid_dim))
                self.blocks.append(Stage(layers))
                dim = hid_dim
        self.out = NormSiLUConv(dim, 2 * config.channels + 1)

    def forward(self, h: Tensor, skips: list[Tensor], inputs: LayerInputs) -> Tensor:
        """Return the output from the bottleneck's map and the encoder's, which are popped off `skips`."""
        for stage in self.blocks:
            maps = [h, skips.pop()]
            if inputs.biases is None:
                maps = [torch.cat(maps, dim=1)]
            h = stage(maps[0], inputs, *maps[1:], size=skips[-1].shape[2:] if skips else None)
        return completed(self, self.out(h, inputs), inputs)


class Stage(nn.ModuleList):
    """Layers in sequence, each called with the inputs that it takes."""

    def forward(
        self, h: Tensor, inputs: LayerInputs, skip: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:
        """Return the last layer's map. skip: further channels of the first one's. size: (H, W) for an Upsample."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h, skip = layer(h, inputs, skip), None
            elif isinstance(layer, Upsample):
                h = layer(h, inputs, size)
            elif isinstance(layer, nn.Conv2d):
                h = convolution(layer, h, inputs)
            else:
                h = layer(h, inputs)
        return h


class NormSiLUConv(nn.ModuleList):
    """GroupNorm, SiLU and a 3x3 convolution: numbers 0, 1 and 2 in checkpoints."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__([nn.GroupNorm(GROUPS, dim), nn.SiLU(), nn.Conv2d(dim, out_dim, 3, padding=1)])

    @property
    def norm(self) -> nn.GroupNorm:
        return cast(nn.GroupNorm, self[0])  # torch types a container's items as Module

    @property
    def conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[2])

    def forward(self, h: Tensor, inputs: LayerInputs, other: Tensor | None = None) -> Tensor:
        """other: the last channels of h, where these are a map of their own."""
        return convolution(self.conv, normalise(self.norm, h, inputs, other=other), inputs)


class ResBlock(nn.Module):
    """x + conv(SiLU(GroupNorm(conv(SiLU(GroupNorm(x))) + Linear(e)))), for level embeddings e after SiLU."""

    def __init__(self, dim: int, out_dim: int, t_emb_dim: int) -> None:
        super().__init__()
        self.conv_1 = NormSiLUConv(dim, out_dim)
        self.norm_with_embedding = NormWithEmbedding(out_dim, t_emb_dim)
        # The Identity is in the place of the published network's dropout.
        self.conv_2 = nn.Sequential(nn.SiLU(), nn.Identity(), nn.Conv2d(out_dim, out_dim, 3, padding=1))
        self.shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else None

    @property
    def last_conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.conv_2[2])

    def project(self, embeddings: Tensor) -> Tensor:
        """Return what the block adds to its map for levels with these embeddings (R, t_emb_dim)."""
        return self.norm_with_embedding.embedding_layer[1](embeddings)

    def forward(self, x: Tensor, inputs: LayerInputs, skip: Tensor | None = None) -> Tensor:
        """skip: the last channels of x, where these are a map of their own."""
        levels = inputs.level_maps[x.shape[2], x.shape[3]]
        rows = levels.projected.get(self)
        rows = self.project(levels.embeddings) if rows is None else rows
        h = self.conv_1(x, inputs, skip)
        h = normalise(self.norm_with_embedding.norm, h, inputs, rows=rows, index=levels.row)
        if inputs.biases is None:
            if self.shortcut is None:
                return packed.convolution(self.last_conv, h, inputs.packed, plus=x)
            return packed.convolution(self.last_conv, h, inputs.packed, onto=pointwise(self.shortcut, x, inputs.packed))
        h = convolution(self.last_conv, h, inputs)
        if self.shortcut is None:
            return map_sum(h, inputs.lacking(self), x)
        return add_pointwise(h, self.shortcut, *((x,) if skip is None else (x, skip)))


class NormWithEmbedding(nn.Module):
    """The parameters of a GroupNorm, and of the projection of the level embedding that is added before it."""

    def __init__(self, dim: int, t_emb_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.embedding_layer = nn.Sequential(nn.SiLU(), nn.Linear(t_emb_dim, dim))  # embeddings come after SiLU


class Attention(nn.Module):
    """Self-attention over the pixels of a map."""

    def __init__(self, dim: int, num_head_channels: int) -> None:
        super().__init__()
        self.num_heads, self.num_head_channels = dim // num_head_channels, num_head_channels
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.qkv = nn.Conv1d(dim, 3 * dim, 1)
        self.proj = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        qkv = pointwise(self.qkv, normalise(self.norm, x, inputs, silu=False), inputs.packed).permute(0, 2, 3, 1)
        heads = (self.num_heads, 3, self.num_head_channels)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, heads).permute(3, 0, 2, 1, 4)
        attended = scaled_attention(q, k, v).transpose(1, 2).flatten(2)
        attended = attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if inputs.biases is None:
            return pointwise(self.proj, attended, inputs.packed).add_(x)
        return add_pointwise(x, self.proj, attended)


class Downsample(nn.Module):
    """A convolution to half the size, rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return convolution(self.downsample, completed(self, x, inputs), inputs)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size (H, W), then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, inputs: LayerInputs, size: torch.Size) -> Tensor:
        if inputs.biases is None:
            return upsampled_convolution(self.conv, x, size, inputs.packed)
        return without_bias(self.conv, F.interpolate(completed(self, x, inputs), size=size, mode="nearest"))


def _blocks(config: SRMUNetConfig, level: int, dim: int) -> list[nn.Module]:
    """Return a ResBlock from `dim` channels to those of a resolution and, if that has it, attention."""
    hid_dim = config.hid_dims[level]
    blocks: list[nn.Module] = [ResBlock(dim, hid_dim, config.t_emb_dim)]
    if config.attention[level]:
        blocks.append(Attention(hid_dim, config.num_head_channels))
    return blocks
