"""Weights laid out as oneDNN reads them, for float32 on a CPU: once a call of the engine, not in each of the network's.

A product then ends, in the same pass, in what follows it: a sum for a convolution, GELU for a linear layer. And a
convolution of a map of twice the size, by the nearest pixel, is a transposed convolution of the map itself, of 4/9 of
the operations. The numbers are those of the plain layers to float32 rounding.

The operators are those to which torch.compile lowers such layers on a CPU. Where a build of torch has none, and for
layers that are more than they look (hooks, subclasses, another forward than torch's), nothing is packed, and the plain
layer is called.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d)}  # somebody may replace them
FEWEST_ROWS = 128  # with fewer, a packed linear layer gains less than the operator's longer call costs


class PackedWeights:
    """The packed weights of a model's layers."""

    def __init__(self) -> None:
        self._weights: dict[nn.Module, Tensor] = {}
        self._doubling: dict[nn.Module, Tensor] = {}

    def pack(self, model: nn.Module, doubling: Iterable[nn.Conv2d] = ()) -> None:
        """Pack the weights as they are now; `doubling` are the convolutions of maps of twice the size."""
        layers = [layer for layer in model.modules() if _can_be_packed(layer)]
        self._weights = {layer: _pack(layer) for layer in layers}
        self._doubling = {conv: doubling_kernel(conv.weight.detach()) for conv in doubling if conv in self._weights}

    def of(self, layer: nn.Module) -> Tensor | None:
        return None if torch.is_autocast_enabled("cpu") else self._weights.get(layer)

    def of_doubling(self, conv: nn.Conv2d) -> Tensor | None:
        return None if torch.is_autocast_enabled("cpu") else self._doubling.get(conv)


def convolution(
    conv: nn.Conv2d,
    x: Tensor,
    packed: PackedWeights | None = None,
    plus: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """conv(x), and another map added to it, if given: `plus` stays as it is, `onto` is the caller's to lose."""
    weight = None if packed is None else packed.of(conv)
    if weight is None:
        out = conv(x)
        return out if plus is None and onto is None else out.add_(plus if onto is None else onto)
    mkldnn, shape = torch.ops.mkldnn, (conv.padding, conv.stride, conv.dilation, conv.groups)
    if plus is None and onto is None:
        return mkldnn._convolution_pointwise.default(x, weight, conv.bias, *shape, "none", [], "")
    ending = ("add", 1.0, None, [], None)
    if onto is not None:
        return mkldnn._convolution_pointwise_.binary(onto, x, weight, conv.bias, *shape, *ending)
    return mkldnn._convolution_pointwise.binary(x, plus, weight, conv.bias, *shape, *ending)


def pointwise(conv: nn.Conv1d | nn.Conv2d, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
    """A convolution of kernel 1 as the matrix product that it is, on a channels-last map (B, C, H, W)."""
    x = x.permute(0, 2, 3, 1)
    weight = None if packed is None else packed.of(conv)
    if weight is None:
        out = F.linear(x, conv.weight.view(conv.out_channels, conv.in_channels), conv.bias)
    else:
        out = torch.ops.mkldnn._linear_pointwise.default(x, weight, conv.bias, "none", [], "")
    return out.permute(0, 3, 1, 2)


def doubled_convolution(conv: nn.Conv2d, x: Tensor, size: torch.Size, packed: PackedWeights | None = None) -> Tensor:
    """conv, of kernel 3 and padding 1, of x resampled to a size (H, W) by the nearest pixel."""
    kernel = None if packed is None else packed.of_doubling(conv)
    if kernel is None or tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
        return convolution(conv, F.interpolate(x, size=size, mode="nearest"), packed)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def linear(layer: nn.Linear, x: Tensor, packed: PackedWeights | None = None, *, gelu: bool = False) -> Tensor:
    """layer(x), then GELU, in its tanh form, if asked for."""
    weight = None if packed is None or x.numel() < FEWEST_ROWS * x.shape[-1] else packed.of(layer)
    if weight is None:
        out = layer(x)
        if gelu and not torch.is_grad_enabled() and _is_plain(layer):  # so the result is nobody else's
            return torch.ops.aten.gelu_.default(out, approximate="tanh")
        return F.gelu(out, approximate="tanh") if gelu else out
    ending = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, *ending)


def doubling_kernel(weight: Tensor) -> Tensor:
    """The transposed convolution's kernel (C, D, 4, 4), of stride 2 and padding 1, for a convolution's (D, C, 3, 3).

    Two neighbouring pixels of the doubled map have one value, so two of the three taps fall together: those of pixel
    2 y + a read rows y - 1 and y of the map for a = 0, and rows y and y + 1 for a = 1.
    """
    for dim in (2, 3):
        before, centre, after = weight.unbind(dim)
        weight = torch.stack((after, centre + after, before + centre, before), dim)
    return weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer does what torch's own does, and nothing else."""
    if FORWARDS.get(type(layer)) is not type(layer).forward or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or _hooks_of_all())


def _can_be_packed(layer: nn.Module) -> bool:
    if not _is_plain(layer):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(layer, "padding", None), str)
    return zeros and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _hooks_of_all() -> bool:
    """Whether there are hooks that every module has."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def _pack(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Tensor:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) or set(layer.kernel_size) == {1}:
        return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1))
    shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *shape)
