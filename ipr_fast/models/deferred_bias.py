"""Convolutions without their biases, which the next operations on a feature map add: for a GPU.

cuDNN's convolutions take no bias, so PyTorch adds it in a pass of its own, over the whole map. Norms and sums read the
map anyway. The bias that a map lacks depends on weights alone: unet_biases.py follows it through the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ipr_fast.kernels import map_sum


class DeferredBiases:
    """The bias (C,) that the input of each layer lacks, for those whose input lacks one."""

    def __init__(self) -> None:
        self._lacking: dict[nn.Module, Tensor] = {}

    def update(self, lacking: Mapping[nn.Module, Tensor]) -> None:
        """Set the biases; those that are there are overwritten, as captured graphs read them."""
        old = self._lacking
        self._lacking = {layer: old[layer].copy_(bias) if layer in old else bias for layer, bias in lacking.items()}

    def of(self, layer: nn.Module) -> Tensor | None:
        """Return the bias that a layer's input lacks."""
        return self._lacking.get(layer)

    def __bool__(self) -> bool:
        """False where the network's convolutions must add their biases."""
        return bool(self._lacking)


def can_defer(x: Tensor) -> bool:
    """Return whether maps on the device of x may lack biases and be overwritten.

    On a GPU; not where autograd may need what is overwritten, nor under autocast, which does not cast sums in place.
    """
    autocast = any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu"))
    return map_sum.is_launched(x) and not (torch.is_grad_enabled() or autocast)


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(x) less its bias, channels-last."""
    return conv._conv_forward(x, conv.weight, None).contiguous(memory_format=torch.channels_last)


def add_pointwise(out: Tensor, conv: nn.Conv1d | nn.Conv2d, *maps: Tensor) -> Tensor:
    """Add conv(x) less its bias to a map, for a kernel of size 1, and return the map: x is the maps concatenated.

    The sums are those of the matrix products. All maps (B, C, H, W) are channels-last.
    """
    sums, start = _rows(out), 0
    weight = conv.weight.view(conv.out_channels, conv.in_channels)
    for x in maps:
        sums.addmm_(_rows(x), weight[:, start : start + x.shape[1]].t())
        start += x.shape[1]
    return out


def _rows(x: Tensor) -> Tensor:
    """Return a channels-last map as a matrix (B H W, C)."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
