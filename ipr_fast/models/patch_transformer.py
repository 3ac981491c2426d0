"""A transformer over patches with partial attention.

Tokens are patches, either context (clean) or active (being regenerated). Context tokens attend to context tokens only,
active tokens to all, so the context's keys and values are constant within an iteration: `prepare` computes them once,
and a step runs the network on the A active tokens only. This is exact, because training uses the same mask.

Each token's level and role enter through adaLN modulation, see transformer_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.slot_inputs import slot_inputs
from ipr_fast.models.level_embedding import LevelEmbedding
from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.models.pixel_networks import PixelEncoder, PixelHead
from ipr_fast.models.transformer_layers import Layer, Modulation, PositionEmbedding, embed, first_norm
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Schedule


class ContextCache(NamedTuple):
    """Each layer's keys concatenated with values (depth, B * N + 1, 2 width); padding slots write to the last row."""

    keys_values: Tensor
    num_patches: int

    def first(self, chains: int) -> ContextCache:
        """Return the first chains' context; its padding row overlaps the next chain's first row and destroys it."""
        rows = chains * self.num_patches + 1
        return ContextCache(self.keys_values[:, :rows], self.num_patches)


class LevelTable(NamedTuple):
    """Precomputed modulation and embeddings, packed weights.

    levels (R,), ascending; layers (depth, R, 6 width) and out (R, 2 width): modulation of active tokens at these.
    context_layers (depth, 1, 1, 6 width), context_out (1, 1, 2 width): modulation of context tokens.
    active_embedding (N, width): position and role of an active token. position (N, width): the position alone.
    packed: weights in a CPU's layout.
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


class PatchTransformer(nn.Module):
    """A Denoiser for patches (B, N, P) of `config`'s grid."""

    value_range = (-1.0, 1.0)  # of the samples that it is trained on

    layers: Sequence[Layer]  # an nn.ModuleList, whose items torch types as Module

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        self.generate_schedule = Schedule(*config.generate_schedule)
        self.refine_schedule = Schedule(*config.refine_schedule)
        width, numel = config.width, self.grid.patch_numel
        self.patch_in = nn.Linear(numel, width)
        self.position = PositionEmbedding(self.grid, width, config.box_size)
        self.role = nn.Embedding(2, width)  # 0 context, 1 active
        self.condition = LevelEmbedding(config.level_features, width)
        self.modulation = nn.Linear(width, 6 * width)
        layers = (Layer(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.add_module("layers", nn.ModuleList(layers))
        self.modulation_out = nn.Linear(width, 2 * width)
        zeroed = [self.modulation, self.modulation_out]
        if config.pixel_width is None:
            self.patch_out = nn.Linear(width, 2 * numel + 1)  # velocity, variance mix, log-variance
            zeroed.append(self.patch_out)
        else:
            self.pixel_in = PixelEncoder(self.grid.channels, width, 2 * config.pixel_width)
            self.pixel_head = PixelHead(self.grid.channels, width, config.pixel_width)
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        *,
        context: ContextCache | None = None,
        table: LevelTable | None = None,
    ) -> Prediction:
        """Predict all patches, all being active (levels (B, N)), or the active slots (levels (B, A)).

        context: from `prepare`; only the slots' tokens are computed then. Without it all tokens are, which gives the
        same numbers to rounding. table: from `tabulate`, used together with a context.
        """
        if active is None:
            return self.predict(patches, levels, torch.ones_like(levels, dtype=torch.bool))
        if context is not None:
            return self._predict_slots(patches, levels, active, context, table)
        num_patches = patches.shape[1]
        is_active = active.scatter(active.occupied, num_patches, fill=False)
        levels = active.scatter(levels, num_patches)
        return self.predict(patches, levels, is_active).at(active)

    def predict(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction:
        """Predict all N patches from every token's level (B, N) and role (B, N) bool, as in training.

        The level of a context token must be 0; its prediction is meaningless.
        """
        return self.read_out(self.encode(patches, levels, is_active), patches, levels)

    def encode(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Tensor:
        """Return the normalised features (B, N, width) that `read_out` turns into the prediction of `predict`."""
        role = is_active.long()
        h = self._read_in(patches) + self._positions() + self.role(role)
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
        table.packed.pack(self, aligned=[] if self.config.pixel_width is not None else [self.patch_out])
        return table

    def prepare(
        self,
        patches: Tensor,
        active: ActivePatches,
        out: ContextCache | None = None,
        *,
        table: LevelTable | None = None,
    ) -> ContextCache:
        """Return the context's keys and values, in `out` if given. Steps overwrite the rows of active tokens."""
        packed, position, modulation = (
            (None, self._positions(), self._of_context())
            if table is None
            else (table.packed, table.position, table.context())
        )
        batch, num_patches, _ = patches.shape
        if out is None:
            shape = (self.config.depth, batch * num_patches + 1, 2 * self.config.width)
            zeros = torch.zeros(shape, dtype=self.patch_in.weight.dtype, device=patches.device)
            out = ContextCache(zeros, num_patches)
        bias = _context_bias(active, num_patches, out.keys_values.dtype)
        h = self._read_in(patches) + position + self.role.weight[0]
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                normed = first_norm(h, adaln)
            q, keys_values = layer.project(normed, packed)
            out.keys_values[i, :-1].view_as(keys_values).copy_(keys_values)
            if i + 1 < len(self.layers):  # nothing reads the context's last output
                h, normed = layer.finish(h, adaln, layer.attend(q, keys_values, bias), packed)
        return out

    def _predict_slots(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches,
        context: ContextCache,
        table: LevelTable | None,
    ) -> Prediction:
        """Predict the active slots."""
        (batch, num_patches, _), dtype = patches.shape, self.patch_in.weight.dtype
        if self.config.pixel_width is not None:
            dtype = patches.dtype  # the head divides by small levels: a rounding of half precision would grow
        if table is None:
            packed, embedding = None, self._positions() + self.role.weight[1]
            values = active.gather(patches).to(dtype)
            modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
            place = active.rows(num_patches)
        else:
            packed, embedding = table.packed, table.active_embedding
            values, row, place = slot_inputs(patches, active.index, levels, table.levels, dtype)
            modulation = table.active(row)
        x = self._read_in(values, packed)
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                h, normed = embed(embedding, active.index, x, adaln)
            cache = context.keys_values[i]
            q, keys_values = layer.project(normed, packed)
            own = keys_values.flatten(0, 1).to(cache.dtype)  # autocast may have lowered them
            cache.index_copy_(0, place.flatten(), own)
            attended = layer.attend(q, cache[:-1].view(batch, num_patches, -1))
            h, normed = layer.finish(h, adaln, attended, packed)
        return self.read_out(normed, values, levels, packed)

    def _read_in(self, patches: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Return what tokens know of their patches (B, n, P) alone: (B, n, width)."""
        h = linear(self.patch_in, patches.to(self.patch_in.weight.dtype), packed)
        return h if self.config.pixel_width is None else h + self.pixel_in(patches, packed)

    def _positions(self) -> Tensor:
        """Return the embeddings (N, width) of all positions."""
        return self.position(torch.arange(self.grid.num_patches, device=self.role.weight.device))

    def _of_context(self) -> Modulation:
        """Return the modulation of context tokens, one row (1, 1, ...) for all."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.role.weight.device)
        return self._modulation(zero.float(), zero)

    def _modulation(self, levels: Tensor, role: Tensor) -> Modulation:
        """Return the modulation of tokens with these levels and roles (...)."""
        condition = F.silu(self.condition(levels) + self.role(role))
        shared = self.modulation(condition)
        return Modulation((shared + layer.table for layer in self.layers), self.modulation_out(condition))

    def read_out(
        self, features: Tensor, patches: Tensor, levels: Tensor, packed: PackedWeights | None = None
    ) -> Prediction:
        """Return the prediction of patches (B, n, P) at levels (B, n), from their features (B, n, width)."""
        if self.config.pixel_width is not None:
            return self.pixel_head(features, patches, levels, packed)
        out = linear(self.patch_out, features, packed)
        numel = self.grid.patch_numel
        velocity, mix, log_variance = out.split((numel, numel, 1), dim=-1)
        return Prediction(velocity, mix.sigmoid(), log_variance.squeeze(-1))


def _context_bias(active: ActivePatches, num_patches: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the context's attention logits (B, 1, 1, N): -inf for active tokens, else 0.

    In a chain without context tokens attend to each other: a softmax over no key is NaN. Rows are padded to a multiple
    of 16 numbers, else torch's attention would do so in every layer.
    """
    place = torch.remainder(active.index, num_patches + 1).long()  # padding, -1, goes to a spare column
    bias = torch.zeros(len(place), -(-(num_patches + 1) // 16) * 16, dtype=dtype, device=place.device)
    bias.scatter_(1, place, -torch.inf).masked_fill_((active.count == num_patches)[:, None], 0.0)
    return bias[:, None, None, :num_patches]
