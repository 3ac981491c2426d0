"""The parts of a PartialTransformer: its layers, the embedding of positions, and the modulation of tokens by level.

Modulation is adaLN: a scale and a shift after each LayerNorm and a gate on each residual (Peebles & Xie 2023), from one
projection that all layers share plus a learned table for each layer (Chen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.modulated_norm import modulated_layer_norm
from ipr_fast.kernels.partial_attention import context_attention, partial_attention
from ipr_fast.kernels.residual_norm import embedded_norm, gated_norm
from ipr_fast.kernels.scaled_attention import scaled_attention
from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.trace import span

EPS = 1e-6  # of every LayerNorm


class LayerModulation(NamedTuple):
    """The modulation of tokens (B, n) in one layer, and in the norm that follows it.

    Without `row` each field is (B, n, width), or (1, 1, width) for all tokens. With `row` (B, n), the tokens' rows,
    each field is a table (R, width).
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor
    mlp_scale: Tensor
    mlp_shift: Tensor
    mlp_gate: Tensor
    next_scale: Tensor
    next_shift: Tensor
    row: Tensor | None


class Modulation(NamedTuple):
    """The modulation of tokens in all layers.

    layers: for each layer (..., 6 width). out: of the output's LayerNorm (..., 2 width).
    row: the tokens' rows (B, n), where `layers` and `out` are tables (R, ...).
    """

    layers: Iterable[Tensor]
    out: Tensor
    row: Tensor | None = None

    def by_layer(self) -> Iterator[LayerModulation]:
        """Yield each layer's modulation; `layers` may be a generator, so that few are in memory at a time."""
        chunks = chain((layer.chunk(6, dim=-1) for layer in self.layers), [self.out.chunk(2, dim=-1)])
        scale, shift, *others = next(chunks)
        for next_scale, next_shift, *next_others in chunks:
            gate, mlp_scale, mlp_shift, mlp_gate = others
            yield LayerModulation(scale, shift, gate, mlp_scale, mlp_shift, mlp_gate, next_scale, next_shift, self.row)
            scale, shift, others = next_scale, next_shift, next_others


class Layer(nn.Module):
    """Attention and an MLP, each with modulated norm and gate; in three parts, so that keys and values can be cached.

    A sum into the residual stream and the norm that follows it are one operation: so the first layer's norm comes
    before its layer, and a layer ends with the next one's.
    Shapes: tokens h (B, n, width); keys concatenated with values (B, m, 2 width).
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)
        self.table = nn.Parameter(torch.randn(6 * width) * width**-0.5)

    @property
    def products(self) -> tuple[nn.Linear, ...]:
        """The linear layers."""
        return self.qkv, self.attention_out, self.mlp_in, self.mlp_out

    def project(self, normed: Tensor, packed: PackedWeights | None = None) -> tuple[Tensor, Tensor]:
        """Return queries (B, n, width), and keys concatenated with values (B, n, 2 width), of tokens after the norm."""
        width = normed.shape[-1]
        qkv = linear(self.qkv, normed, packed)
        return qkv[..., :width], qkv[..., width:]

    def attend(self, q: Tensor, keys_values: Tensor, may_attend: Tensor) -> Tensor:
        """Return the attention (B, n, width) of queries to the keys of a mask like (B, 1, n, m)."""
        k, v = keys_values.chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if q.is_cuda or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
            return scaled_attention(q, k, v, may_attend).transpose(1, 2).flatten(2)
        with torch.autocast(q.device.type, enabled=False):  # on a CPU the gradient in bfloat16 takes six times as long
            out = scaled_attention(q.float(), k.float(), v.float(), may_attend)
        return out.transpose(1, 2).flatten(2)

    def attend_in_context(self, q: Tensor, keys_values: Tensor, cache: Tensor, slot: Tensor, bias: Tensor) -> Tensor:
        """Return the attention (B, N, width) among context tokens: see kernels/partial_attention.py."""
        return context_attention(q, keys_values, cache, slot, bias, heads=self.num_heads)

    def attend_partially(self, q: Tensor, keys_values: Tensor, cache: Tensor, slot: Tensor, place: Tensor) -> Tensor:
        """Return the attention (B, A, width) of active tokens to all: see kernels/partial_attention.py."""
        with span("partial_attention"):
            return partial_attention(q, keys_values, cache, slot, place, heads=self.num_heads)

    def finish(
        self, h: Tensor, adaln: LayerModulation, attended: Tensor, packed: PackedWeights | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output (B, n, width), and the norm that follows, from its input and `attend`'s result."""
        x = linear(self.attention_out, attended, packed)
        h, normed = _add(h, adaln.gate, x, adaln.mlp_scale, adaln.mlp_shift, adaln.row)
        x = linear(self.mlp_out, linear(self.mlp_in, normed, packed, gelu=True), packed)
        return _add(h, adaln.mlp_gate, x, adaln.next_scale, adaln.next_shift, adaln.row)


class PositionEmbedding(nn.Module):
    """Learned embeddings of a token's place along each dimension of the grid and, where there are boxes, its box.

    shape: frames, rows and columns; images have no frames, sequences columns alone. Tokens are numbered with the last
    dimension fastest. box_size: > 0 for rows and columns alone.
    """

    rows: nn.Parameter
    columns: nn.Parameter

    def __init__(self, shape: tuple[int, ...], width: int, box_size: int) -> None:
        super().__init__()
        self.shape, self.count = shape, math.prod(shape)
        for name, size in zip(self._names, shape, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(size, width) * 0.5))
        self.box_size = box_size
        self.boxes: nn.Parameter | None = None
        if box_size:
            self.boxes = nn.Parameter(torch.randn(self.count // box_size**2, width) * 0.5)

    def forward(self, position: Tensor) -> Tensor:
        """Return the embeddings (..., width) of positions (...)."""
        ones = [1] * len(self.shape)
        axes = [
            getattr(self, name).view(*ones[:i], size, *ones[i + 1 :], -1)
            for i, (name, size) in enumerate(zip(self._names, self.shape, strict=True))
        ]
        table = sum(axes[1:], axes[0])
        if self.boxes is not None:
            size = self.box_size
            boxes = self.boxes.view(len(self.rows) // size, 1, len(self.columns) // size, 1, -1)
            table = table + boxes.expand(-1, size, -1, size, -1).reshape(table.shape)
        return F.embedding(position, table.flatten(0, -2))

    @property
    def _names(self) -> tuple[str, ...]:
        return ("frames", "rows", "columns")[-len(self.shape) :]


def first_norm(h: Tensor, adaln: LayerModulation) -> Tensor:
    """Return the norm of a layer's input: LayerNorm(h) (1 + scale) + shift."""
    with span("layer_norm"):
        return modulated_layer_norm(h, adaln.scale, adaln.shift, eps=EPS, row=adaln.row)


def embed(embedding: Tensor, index: Tensor, x: Tensor, adaln: LayerModulation) -> tuple[Tensor, Tensor]:
    """Return the tokens x plus rows `index` of an embedding, (B, n, width), and their norm; padding takes row 0."""
    with span("residual_norm"):
        return embedded_norm(embedding, index, x, adaln.scale, adaln.shift, eps=EPS, row=adaln.row)


def _add(h: Tensor, gate: Tensor, x: Tensor, scale: Tensor, shift: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return h + gate x and its norm."""
    with span("residual_norm"):
        return gated_norm(h, gate, x, scale, shift, eps=EPS, row=row)
