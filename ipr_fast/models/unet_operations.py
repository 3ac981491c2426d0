"""Operations of a UNet's layers, by where they run, and the inputs that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from ipr_fast.kernels.group_norm import group_norm
from ipr_fast.kernels.map_sum import map_sum
from ipr_fast.models import packed
from ipr_fast.models.deferred_bias import DeferredBiases, without_bias
from ipr_fast.models.packed import PackedWeights
from ipr_fast.models.srm_unet_config import GROUPS
from ipr_fast.trace import span


class LevelMap(NamedTuple):
    """The levels of a feature map, embedded.

    embeddings  (R, t_emb_dim)  SiLU of the embeddings of R levels
    row         (B, h, w)       each cell's row of `embeddings`
    projected                   each ResBlock's projection (R, C) of `embeddings`, where there is a table of them
    """

    embeddings: Tensor
    row: Tensor
    projected: Mapping[nn.Module, Tensor] = MappingProxyType({})


class LayerInputs(NamedTuple):
    """Inputs that all layers share: a LevelMap for each size (H, W) of feature map, and weights for a CPU or for a GPU.

    packed: for a CPU. biases: for a GPU; with them, maps lack these biases, and layers may overwrite their input.
    """

    level_maps: dict[tuple[int, int], LevelMap]
    packed: PackedWeights | None = None
    biases: DeferredBiases | None = None

    def lacking(self, layer: nn.Module) -> Tensor | None:
        """Return the bias that a layer's input lacks."""
        return None if self.biases is None else self.biases.of(layer)


def convolution(conv: nn.Conv2d, x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return conv(x), on a GPU less its bias."""
    return packed.convolution(conv, x, inputs.packed) if inputs.biases is None else without_bias(conv, x)


def completed(layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return a layer's input with the bias that it lacks, which is added in place."""
    bias = inputs.lacking(layer)
    return x if bias is None else map_sum(x, bias)


def normalise(
    norm: nn.GroupNorm,
    h: Tensor,
    inputs: LayerInputs,
    *,
    other: Tensor | None = None,
    rows: Tensor | None = None,
    index: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return SiLU(GroupNorm(h)), after adding rows (R, C) to the cells by index (B, h, w), in one operation.

    other: the last channels of h, where these are a map of their own.
    """
    shift = inputs.lacking(norm)
    with span("group_norm"):
        return group_norm(
            h,
            norm.weight,
            norm.bias,
            groups=GROUPS,
            eps=norm.eps,
            other=other,
            shift=shift,
            rows=rows,
            index=index,
            silu=silu,
        )
