"""The network of an SRMUNet: encoder, bottleneck and decoder, with the published checkpoints' parameter names.

A ResBlock adds the embedded noise level of each cell to its feature map: `h = GroupNorm(h + Linear(SiLU(e)))`. A cell
is a square of pixels of equal level. Feature maps (B, C, H, W) are channels-last, so that 1x1 convolutions are matrix
products and attention reads pixels as tokens, without copying the map.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ipr_fast.kernels.group_norm import group_norm
from ipr_fast.kernels.scaled_attention import scaled_attention
from ipr_fast.models.packed import PackedWeights, convolution, pointwise, upsampled_convolution
from ipr_fast.models.srm_unet_config import GROUPS, SRMUNetConfig
from ipr_fast.trace import span


class LevelMap(NamedTuple):
    """The levels of a feature map, embedded.

    embeddings  (R, t_emb_dim)  SiLU of the embeddings of R levels
    row         (B, h, w)       each cell's row of `embeddings`
    """

    embeddings: Tensor
    row: Tensor


class LayerInputs(NamedTuple):
    """Inputs that all layers share: a LevelMap for each feature map's height, and packed weights."""

    level_maps: dict[int, LevelMap]
    packed: PackedWeights | None = None


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
            h = torch.cat([h, skips.pop()], dim=1)
            h = stage(h, inputs, size=skips[-1].shape[2:] if skips else None)
        return self.out(h, inputs.packed)


class Stage(nn.ModuleList):
    """Layers in sequence, each called with the inputs that it takes."""

    def forward(self, h: Tensor, inputs: LayerInputs, size: torch.Size | None = None) -> Tensor:
        """Return the last layer's map. size: (H, W) for an Upsample."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, inputs.level_maps[h.shape[-1]], inputs.packed)
            elif isinstance(layer, Upsample):
                h = layer(h, size, inputs.packed)
            elif isinstance(layer, nn.Conv2d):
                h = convolution(layer, h, inputs.packed)
            else:
                h = layer(h, inputs.packed)
        return h


class NormSiLUConv(nn.ModuleList):
    """GroupNorm, SiLU and a 3x3 convolution: numbers 0, 1 and 2 in checkpoints."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__([nn.GroupNorm(GROUPS, dim), nn.SiLU(), nn.Conv2d(dim, out_dim, 3, padding=1)])

    def forward(self, h: Tensor, packed: PackedWeights | None = None) -> Tensor:
        norm, conv = cast(nn.GroupNorm, self[0]), cast(nn.Conv2d, self[2])  # torch types a container's items as Module
        return convolution(conv, norm_silu(norm, h), packed)


class ResBlock(nn.Module):
    """x + conv(SiLU(GroupNorm(conv(SiLU(GroupNorm(x))) + Linear(e)))), for level embeddings e after SiLU."""

    def __init__(self, dim: int, out_dim: int, t_emb_dim: int) -> None:
        super().__init__()
        self.conv_1 = NormSiLUConv(dim, out_dim)
        self.norm_with_embedding = NormWithEmbedding(out_dim, t_emb_dim)
        # The Identity is in the place of the published network's dropout.
        self.conv_2 = nn.Sequential(nn.SiLU(), nn.Identity(), nn.Conv2d(out_dim, out_dim, 3, padding=1))
        self.shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x: Tensor, levels: LevelMap, packed: PackedWeights | None = None) -> Tensor:
        conv_2 = cast(nn.Conv2d, self.conv_2[2])
        projected = self.norm_with_embedding.embedding_layer[1](levels.embeddings)
        h = self.conv_1(x, packed)
        h = norm_silu(self.norm_with_embedding.norm, h, projected, levels.row)
        if self.shortcut is None:
            return convolution(conv_2, h, packed, plus=x)
        return convolution(conv_2, h, packed, onto=pointwise(self.shortcut, x, packed))


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

    def forward(self, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
        norm = self.norm
        normed = group_norm(x, norm.weight, norm.bias, groups=GROUPS, eps=norm.eps, silu=False)
        qkv = pointwise(self.qkv, normed, packed).permute(0, 2, 3, 1)
        heads = (self.num_heads, 3, self.num_head_channels)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, heads).permute(3, 0, 2, 1, 4)
        attended = scaled_attention(q, k, v).transpose(1, 2).flatten(2)
        attended = attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return pointwise(self.proj, attended, packed).add_(x)


class Downsample(nn.Module):
    """A convolution to half the size, rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
        return convolution(self.downsample, x, packed)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size (H, W), then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size, packed: PackedWeights | None = None) -> Tensor:
        return upsampled_convolution(self.conv, x, size, packed)


def norm_silu(norm: nn.GroupNorm, h: Tensor, rows: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return SiLU(GroupNorm(h)), after adding rows (R, C) to the cells by index (B, h, w), in one operation."""
    with span("group_norm"):
        return group_norm(h, norm.weight, norm.bias, groups=GROUPS, eps=norm.eps, rows=rows, index=index)


def _blocks(config: SRMUNetConfig, level: int, dim: int) -> list[nn.Module]:
    """Return a ResBlock from `dim` channels to those of a resolution and, if that has it, attention."""
    hid_dim = config.hid_dims[level]
    blocks: list[nn.Module] = [ResBlock(dim, hid_dim, config.t_emb_dim)]
    if config.attention[level]:
        blocks.append(Attention(hid_dim, config.num_head_channels))
    return blocks
