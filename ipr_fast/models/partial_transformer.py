"""A transformer with partial attention: what PatchTransformer and TokenTransformer share.

Its tokens are patches, or positions of discrete tokens: either context (clean) or active (being regenerated). Context
tokens attend to context tokens only, active tokens to all, so the context's keys and values are constant within an
iteration: `prepare` computes them once, and a step runs the network on the A active tokens only. This is exact, because
training uses the same mask.

Each token's level and role enter through adaLN modulation, see transformer_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.context_mask import context_mask
from ipr_fast.models.model_config import LayersConfig
from ipr_fast.models.packed import PackedWeights
from ipr_fast.models.transformer_layers import Layer, Modulation, PositionEmbedding, embed, first_norm
from ipr_fast.sampling.patches import ActivePatches


class ContextCache(NamedTuple):
    """The context tokens' part of the attention, and which tokens are active.

    keys_values (depth, B * N + 1, 2 width), or longer: each layer's keys concatenated with values. Rows of active
    tokens are meaningless and may be written to, as one behind the chains' rows is for padding slots.
    slot (B, N + 1) int32: each token's slot, -1 for context; the last column is spare.
    """

    keys_values: Tensor
    slot: Tensor

    def first(self, chains: int) -> ContextCache:
        """Return the first chains' context; padding may be written into the next chain's first row."""
        return ContextCache(self.keys_values, self.slot[:chains])


class LevelTable(NamedTuple):
    """Precomputed modulation and embeddings, packed weights.

    levels (R,), ascending; layers (depth, R, 6 width) and out (R, 2 width): modulation of active tokens at these.
    context_layers (depth, 1, 1, 6 width), context_out (1, 1, 2 width): modulation of context tokens.
    active_embedding (N, width): position and role of an active token. position (N, width): the position alone.
    packed: weights in the layout that the device's products take.
    """

    levels: Tensor
    layers: Tensor
    out: Tensor
    context_layers: Tensor
    context_out: Tensor
    active_embedding: Tensor
    position: Tensor
    packed: PackedWeights

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:-1]

    def active(self, row: Tensor) -> Modulation:
        """Return the modulation of active tokens at the levels of these rows (B, n)."""
        return Modulation((self.layers[i] for i in range(len(self.layers))), self.out, row)

    def context(self) -> Modulation:
        """Return the modulation of context tokens."""
        return Modulation((self.context_layers[i] for i in range(len(self.layers))), self.context_out)


class PartialTransformer(nn.Module):
    """The layers, and the embeddings of position, role and level; subclasses add what is read in and out."""

    layers: Sequence[Layer]  # an nn.ModuleList, whose items torch types as Module

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.width, self.depth = config.width, config.depth

    def _add_layers(self, config: LayersConfig, shape: tuple[int, ...]) -> None:
        """Add the shared modules, for tokens in a grid of this shape."""
        width = config.width
        self.position = PositionEmbedding(shape, width, config.box_size)
        self.role = nn.Embedding(2, width)  # 0 context, 1 active
        self.condition = self._level_embedding()
        self.modulation = nn.Linear(width, 6 * width)
        layers = (Layer(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.add_module("layers", nn.ModuleList(layers))
        self.modulation_out = nn.Linear(width, 2 * width)
        for layer in (self.modulation, self.modulation_out):
            set_to_zero(layer)

    def encode(self, values: Tensor, levels: Tensor, is_active: Tensor) -> Tensor:
        """Return the normalised features (B, N, width) of all N tokens from every token's level and role (B, N).

        values (B, N, ...): patches or tokens. The level of a context token must be 0; its features mean nothing.
        """
        role = is_active.long()
        h = self._read_in(values) + self._positions() + self.role(role)
        modulation = self._modulation(levels, role)
        may_attend = is_active[:, None, :, None] | ~is_active[:, None, None, :]
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                normed = first_norm(h, adaln)
            q, keys_values = layer.project(normed)
            h, normed = layer.finish(h, adaln, layer.attend(q, keys_values, may_attend))
        return normed

    def tabulate(self, levels: Tensor, out: LevelTable | None = None) -> LevelTable:
        """Return the modulation of active tokens at levels (R,), ascending; written into `out`, if given."""
        active, context = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64)), self._of_context()
        position = self._positions()
        table = LevelTable(
            levels.clone(),
            torch.stack(list(active.layers)),
            active.out,
            torch.stack(list(context.layers)),
            context.out,
            position + self.role.weight[1],
            position,
            PackedWeights() if out is None else out.packed,
        )
        if out is not None:
            for own, new in zip(out.tensors, table.tensors, strict=True):
                own.copy_(new)
            table = out
        inner = (each for layer in self.layers for each in layer.products)
        table.packed.pack(self, split=(*inner, *self._outer_layers()), aligned=self._aligned_layers())
        return table

    def prepare(
        self,
        values: Tensor,
        active: ActivePatches,
        out: ContextCache | None = None,
        *,
        table: LevelTable | None = None,
    ) -> ContextCache:
        """Return the context's keys and values, in `out` if given; there are none if all tokens are active."""
        packed, position, modulation = (
            (None, self._positions(), self._of_context())
            if table is None
            else (table.packed, table.position, table.context())
        )
        batch, num_patches = values.shape[:2]
        if out is None:
            shape = (self.depth, batch * num_patches + 1, 2 * self.width)
            zeros = torch.zeros(shape, dtype=self.role.weight.dtype, device=values.device)
            out = ContextCache(zeros, zeros.new_empty(batch, num_patches + 1, dtype=torch.int32))
        bias = context_mask(active.index, active.count, out.slot, out.keys_values.dtype)
        if active.whole:
            return out
        h = self._read_in(values) + position + self.role.weight[0]
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                normed = first_norm(h, adaln)
            q, keys_values = layer.project(normed, packed)
            out.keys_values[i, : batch * num_patches].view_as(keys_values).copy_(keys_values)
            if i + 1 < len(self.layers):  # nothing reads the context's last output
                attended = layer.attend_in_context(q, keys_values, out.keys_values[i], out.slot, bias)
                h, normed = layer.finish(h, adaln, attended, packed)
        return out

    def _encode_slots(
        self,
        x: Tensor,
        index: Tensor,
        place: Tensor,
        modulation: Modulation,
        context: ContextCache,
        table: LevelTable | None,
    ) -> Tensor:
        """Return the normalised features (B, A, width) of the active slots, given the context.

        x (B, A, width): what `_read_in` makes of the slots' values. index (B, A): the slots' positions, -1 for padding.
        place (B, A): their rows in the cache.
        """
        packed, embedding = (
            (None, self._positions() + self.role.weight[1]) if table is None else (table.packed, table.active_embedding)
        )
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                h, normed = embed(embedding, index, x, adaln)
            q, keys_values = layer.project(normed, packed)
            attended = layer.attend_partially(q, keys_values, context.keys_values[i], context.slot, place)
            h, normed = layer.finish(h, adaln, attended, packed)
        return normed

    def _modulation(self, levels: Tensor, role: Tensor) -> Modulation:
        """Return the modulation of tokens with these levels and roles (...)."""
        condition = F.silu(self.condition(levels) + self.role(role))
        shared = self.modulation(condition)
        return Modulation((shared + layer.table for layer in self.layers), self.modulation_out(condition))

    def _of_context(self) -> Modulation:
        """Return the modulation of context tokens, one row (1, 1, ...) for all."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.role.weight.device)
        return self._modulation(zero.float(), zero)

    def _positions(self) -> Tensor:
        """Return the embeddings (N, width) of all positions."""
        return self.position(torch.arange(self.position.count, device=self.role.weight.device))

    # ------------------------------------------------------------------------------------------------ of subclasses

    def _level_embedding(self) -> nn.Module:
        """Make the module that embeds levels (...) as (..., width)."""
        raise NotImplementedError

    def _read_in(self, values: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Return what the network's tokens know of their values (B, n, ...) alone: (B, n, width)."""
        raise NotImplementedError

    def _outer_layers(self) -> Sequence[nn.Linear]:
        """Return the linear layers that read in and out."""
        raise NotImplementedError

    def _aligned_layers(self) -> Sequence[nn.Linear]:
        """Return the output layers whose rows kernels read on a GPU."""
        return ()


def set_to_zero(layer: nn.Linear) -> None:
    """Set the weight and the bias of a layer to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
