"""The biases that the feature maps of a UNet lack where its convolutions leave them out, see deferred_bias.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipr_fast.models import unet
from ipr_fast.models.packed import Packable, has_hooks, is_plain
from ipr_fast.models.unet import Attention, Downsample, ResBlock, UNet

Lacking = dict[nn.Module, Tensor]


@torch.no_grad()
def lacking_biases(network: UNet) -> Lacking:
    """Return the bias (C,) that each layer's input lacks, of those that lack one; none unless `is_as_built`.

    Keys are norms, resampling layers, ResBlocks and the decoder. A ResBlock's is that of both maps in its residual sum,
    the decoder's is that of its output.
    """
    if not is_as_built(network):
        return {}
    lacking: Lacking = {}
    h: Tensor | None = None
    skips: list[Tensor | None] = []
    for stage in network.encoder.blocks:
        h = _after(stage, lacking, h)
        if isinstance(next(stage.children()), Downsample):
            skips[-1] = None  # it was added to the map
        skips.append(h)
    h = _after(network.bottleneck.blocks, lacking, h)
    for stage in network.decoder.blocks:
        h = _after(stage, lacking, h, skips.pop())
    _note(lacking, network.decoder.out.norm, h)
    _note(lacking, network.decoder, _sum(network.decoder.out.conv.bias))
    return lacking


def is_as_built(network: UNet) -> bool:
    """Return whether all layers are the network's own, without hooks: others may look at a map, or keep it."""
    return all(
        is_plain(layer) if isinstance(layer, Packable) else _is_own(layer) and not has_hooks(layer)
        for layer in network.modules()
    )


def _is_own(layer: nn.Module) -> bool:
    module = type(layer).__module__
    return (module == unet.__name__ or module.startswith("torch.nn.modules.")) and "forward" not in vars(layer)


def _after(stage: nn.Module, lacking: Lacking, h: Tensor | None, skip: Tensor | None = None) -> Tensor | None:
    """Return what a stage's output lacks, from what its input and the skip lack."""
    for layer in stage.children():
        if isinstance(layer, ResBlock):
            h = _after_res_block(layer, lacking, _concatenated(h, skip, layer.conv_1.norm.num_channels))
        elif isinstance(layer, Attention):
            _note(lacking, layer.norm, h)
            h = _sum(h, layer.proj.bias)
        else:
            _note(lacking, layer, h)
            h = _sum(next(part for part in layer.modules() if isinstance(part, nn.Conv2d)).bias)
    return h


def _after_res_block(block: ResBlock, lacking: Lacking, x: Tensor | None) -> Tensor | None:
    _note(lacking, block.conv_1.norm, x)
    _note(lacking, block.norm_with_embedding.norm, _sum(block.conv_1.conv.bias))
    if block.shortcut is None:
        _note(lacking, block, _sum(block.last_conv.bias, x))
        return None
    through = None if x is None else block.shortcut.weight.flatten(1).to(x.dtype) @ x
    return _sum(block.last_conv.bias, block.shortcut.bias, through)


def _note(lacking: Lacking, layer: nn.Module, bias: Tensor | None) -> None:
    if bias is not None:
        lacking[layer] = bias


def _concatenated(h: Tensor | None, skip: Tensor | None, channels: int) -> Tensor | None:
    """Return what two maps, of `channels` channels together, lack; without a skip the first has them all."""
    known = h if skip is None else skip
    if known is None:
        return None
    rest = known.new_zeros(channels - len(known))
    return torch.cat([rest if each is None else each for each in (h, skip)])


def _sum(*biases: Tensor | None) -> Tensor | None:
    """Return the sum of biases, in float32 at least; None if there are none."""
    given = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in biases if each is not None]
    return torch.stack(given).sum(0) if given else None
