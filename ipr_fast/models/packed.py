"""Float32 weights packed into oneDNN's layout on a CPU, once per call of the engine instead of in every network call.

Packed operators also fuse the next operation: a sum after a convolution, GELU after a linear layer. A convolution after
2x nearest-neighbour upsampling becomes one transposed convolution with 4/9 of the operations. Results equal the plain
layers' to float32 rounding.

The operators are those that torch.compile uses on a CPU. Layers with hooks, of subclasses or with a replaced forward
are not packed, nor is any layer where torch was built without oneDNN: the plain layer is called instead.

On a GPU the float32 weights of linear layers are split into two parts that TF32 holds (kernels/linear.py), for use
where products may not be those of TF32. The output layer is laid out anew too: with rows of a multiple of ALIGNMENT
numbers, which kernels read in vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels import linear as split_linear

Packable = nn.Linear | nn.Conv1d | nn.Conv2d
FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {  # torch's own, which others may replace later
    nn.Linear: nn.Linear.forward,
    nn.Conv1d: nn.Conv1d.forward,
    nn.Conv2d: nn.Conv2d.forward,
}
ALIGNMENT = 16  # numbers; by a multiple of 16 Triton compiles loads of vectors
MIN_ROWS = 128  # with fewer, the packed operator's overhead outweighs its gain
MIN_SPLIT_ROWS = 64  # with fewer, cuBLAS is as fast


class PackedWeights:
    """The packed weights of a model's layers."""

    def __init__(self) -> None:
        self._weights: dict[nn.Module, Tensor] = {}
        self._upsampling: dict[nn.Module, Tensor] = {}
        self._aligned: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._parts: dict[nn.Module, Tensor] = {}

    def pack(
        self,
        model: nn.Module,
        upsampling: Iterable[nn.Conv2d] = (),
        split: Iterable[nn.Linear] = (),
        aligned: Iterable[nn.Linear] = (),
    ) -> None:
        """Pack the current weights.

        upsampling: the convolutions that follow 2x upsampling. split: the layers that `linear` gets; aligned: those of
        them whose output rows kernels read on a GPU. What is there of a GPU's weights is overwritten, as captured
        graphs read it, and stays while hooks are registered that keep it from being used.
        """
        self._weights = {layer: _pack(layer) for layer in model.modules() if _can_be_packed(layer)}
        self._upsampling = {
            conv: upsampling_kernel(conv.weight.detach()) for conv in upsampling if conv in self._weights
        }
        self._aligned = {
            layer: _aligned(layer, self._aligned.get(layer))
            for layer in aligned
            if _can_be_aligned(layer) and (layer in self._aligned or is_plain(layer))
        }
        self._parts = {
            layer: split_linear.split(layer.weight.detach(), self._parts.get(layer))
            for layer in split
            if split_linear.runs_on(layer.weight) and (layer in self._parts or is_plain(layer))
        }

    def weight(self, layer: nn.Module) -> Tensor | None:
        """Return a layer's packed weight; None where it has none, and under autocast."""
        return None if torch.is_autocast_enabled("cpu") else self._weights.get(layer)

    def upsampling_kernel(self, conv: nn.Conv2d) -> Tensor | None:
        """Return the kernel of `upsampling_kernel`; None where there is none, and under autocast."""
        return None if torch.is_autocast_enabled("cpu") else self._upsampling.get(conv)

    def aligned(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight and the bias of a layer with rows of zeros below, where it has them."""
        there = self._aligned.get(layer)
        return there if there is not None and is_plain(layer) else None

    @property
    def on_gpu(self) -> list[Tensor]:
        """The weights that kernels read in place of the layers' own."""
        alone = (weight for layer, (weight, _) in self._aligned.items() if layer not in self._parts)
        return [*self._parts.values(), *alone]

    def parts(self, layer: nn.Linear, x: Tensor) -> Tensor | None:
        """Return the parts of a layer's weight for inputs x (..., K); None where torch's product is as fast."""
        parts = self._parts.get(layer)
        if parts is None or not is_plain(layer) or x.numel() < MIN_SPLIT_ROWS * x.shape[-1]:
            return None
        return None if split_linear.takes_tf32() or torch.is_autocast_enabled("cuda") else parts


def convolution(
    conv: nn.Conv2d,
    x: Tensor,
    packed: PackedWeights | None = None,
    plus: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Return conv(x), plus a map of its shape if given: `plus` is not written to, `onto` may be overwritten."""
    weight = None if packed is None else packed.weight(conv)
    if weight is None:
        out = conv(x)
        return out if plus is None and onto is None else out.add_(plus if onto is None else onto)
    mkldnn, shape = torch.ops.mkldnn, (conv.padding, conv.stride, conv.dilation, conv.groups)
    if plus is None and onto is None:
        return mkldnn._convolution_pointwise.default(x, weight, conv.bias, *shape, "none", [], "")
    ending: tuple[str, float, None, list[float], None] = ("add", 1.0, None, [], None)
    if onto is not None:
        return mkldnn._convolution_pointwise_.binary(onto, x, weight, conv.bias, *shape, *ending)
    return mkldnn._convolution_pointwise.binary(x, plus, weight, conv.bias, *shape, *ending)


def pointwise(conv: nn.Conv1d | nn.Conv2d, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
    """Return conv(x) for a kernel of size 1 as a matrix product; x (B, C, H, W) is channels-last."""
    x = x.permute(0, 2, 3, 1)
    weight = None if packed is None else packed.weight(conv)
    if weight is None:
        out = F.linear(x, conv.weight.view(conv.out_channels, conv.in_channels), conv.bias)
    else:
        out = torch.ops.mkldnn._linear_pointwise.default(x, weight, conv.bias, "none", [], "")
    return out.permute(0, 3, 1, 2)


def upsampled_convolution(conv: nn.Conv2d, x: Tensor, size: torch.Size, packed: PackedWeights | None = None) -> Tensor:
    """Return conv(x resampled to `size` (H, W) by the nearest pixel), for a conv of kernel 3 and padding 1."""
    kernel = None if packed is None else packed.upsampling_kernel(conv)
    if kernel is None or tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
        return convolution(conv, F.interpolate(x, size=size, mode="nearest"), packed)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def linear(layer: nn.Linear, x: Tensor, packed: PackedWeights | None = None, *, gelu: bool = False) -> Tensor:
    """Return layer(x), or GELU(layer(x)) in its tanh form. Of an aligned layer, columns of a wider matrix.

    In half precision the product does not end in GELU, as that of torch._addmm_activation does: cuBLASLt takes the
    hardware's tanh, off by 2**-11, and in float32 a kernel of its own after the product (read in the code of CUDA 13
    for sm_90).
    """
    if packed is not None and (parts := packed.parts(layer, x)) is not None:
        wider = packed.aligned(layer)
        columns = None if wider is None else len(wider[0])
        return split_linear.linear(x, parts, layer.bias, gelu=gelu, columns=columns)
    aligned = None if packed is None or gelu else packed.aligned(layer)
    if aligned is not None:
        return F.linear(x, *aligned)[..., : layer.out_features]
    weight = None if packed is None or x.numel() < MIN_ROWS * x.shape[-1] else packed.weight(layer)
    if weight is None:
        out = layer(x)
        if gelu and not torch.is_grad_enabled() and is_plain(layer):  # so `out` is a new tensor
            return torch.ops.aten.gelu_.default(out, approximate="tanh")
        return F.gelu(out, approximate="tanh") if gelu else out
    ending: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, *ending)


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Return the kernel (C, D, 4, 4) of the transposed convolution that equals 2x upsampling and conv (D, C, 3, 3).

    Its stride is 2, its padding 1. Neighbouring pixels of the upsampled map are equal, so two of the three taps of
    output row 2 y + a read the same input row: rows y - 1 and y are read for a = 0, rows y and y + 1 for a = 1.
    """
    for dim in (2, 3):
        before, centre, after = weight.unbind(dim)
        weight = torch.stack((after, centre + after, before + centre, before), dim)
    return weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is torch's own class, without hooks or a replaced forward."""
    if FORWARDS.get(type(layer)) is not type(layer).forward or "forward" in vars(layer):
        return False
    return not has_hooks(layer)


def _can_be_aligned(layer: nn.Linear) -> bool:
    return layer.weight.is_cuda and layer.out_features % ALIGNMENT != 0


def _aligned(layer: nn.Linear, out: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias with zeros below, to a multiple of ALIGNMENT rows; in `out` if it is like them."""
    rows, weight, bias = -layer.out_features % ALIGNMENT, layer.weight.detach(), layer.bias
    new = F.pad(weight, (0, 0, 0, rows)), None if bias is None else F.pad(bias.detach(), (0, rows))
    if out is None or not _alike(out[0], new[0]):
        return new
    for own, each in zip(out, new, strict=True):
        if own is not None and each is not None:
            own.copy_(each)
    return out


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def has_hooks(layer: nn.Module) -> bool:
    """Return whether a layer's call runs hooks, of its own or for all modules."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or _has_global_hooks())


def _can_be_packed(layer: nn.Module) -> TypeGuard[Packable]:
    if not isinstance(layer, Packable) or not is_plain(layer):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(layer, "padding", None), str)
    return zeros and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _has_global_hooks() -> bool:
    """Return whether hooks for all modules are registered."""
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)


def _pack(layer: Packable) -> Tensor:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) or set(layer.kernel_size) == {1}:
        return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1))
    shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *shape)
