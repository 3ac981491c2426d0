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
    """Precomputed modulation per level, active-token embedding, packed weights.

    levels (R,), ascending; layers (depth, R, 6 width) and out (R, 2 width), see Modulation.
    active_embedding (N, width): position and role of an active token. packed: weights in a CPU's layout.
    """

    levels: Tensor
    layers: Tensor
    out: Tensor
    active_embedding: Tensor
    packed: PackedWeights

    def modulation(self, row: Tensor) -> Modulation:
        """Return the modulation of tokens at the levels of these rows (B, n)."""
        return Modulation((self.layers[i] for i in range(len(self.layers))), self.out, row)


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
        position = torch.arange(patches.shape[1], device=patches.device)
        h, modulation = self._embed(patches, position, is_active.long()), self._modulation(levels, is_active.long())
        may_attend = is_active[:, None, :, None] | ~is_active[:, None, None, :]
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                normed = first_norm(h, adaln)
            q, keys_values = layer.project(normed)
            h, normed = layer.finish(h, adaln, layer.attend(q, keys_values, may_attend))
        return normed

    def tabulate(self, levels: Tensor, out: LevelTable | None = None) -> LevelTable:
        """Return the modulation of active tokens at levels (R,), ascending; written into `out`, if given."""
        modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
        layers, embedding = torch.stack(list(modulation.layers)), self._active_embedding()
        if out is None:
            out = LevelTable(levels.clone(), layers, modulation.out, embedding, PackedWeights())
        else:
            out.levels.copy_(levels)
            out.layers.copy_(layers)
            out.out.copy_(modulation.out)
            out.active_embedding.copy_(embedding)
        out.packed.pack(self)
        return out

    def prepare(
        self,
        patches: Tensor,
        active: ActivePatches,
        out: ContextCache | None = None,
        *,
        table: LevelTable | None = None,
    ) -> ContextCache:
        """Return the context's keys and values, in `out` if given. Steps overwrite the rows of active tokens."""
        packed = None if table is None else table.packed
        batch, num_patches, _ = patches.shape
        if out is None:
            shape = (self.config.depth, batch * num_patches + 1, 2 * self.config.width)
            zeros = torch.zeros(shape, dtype=self.patch_in.weight.dtype, device=patches.device)
            out = ContextCache(zeros, num_patches)
        is_active = active.scatter(active.occupied, num_patches, fill=False)
        # In a chain without context tokens attend to each other: a softmax over no key is NaN.
        may_attend = (~is_active | is_active.all(1, keepdim=True))[:, None, None, :]
        position = torch.arange(num_patches, device=patches.device)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=patches.device)  # the level and the role of all tokens
        h, modulation = self._embed(patches, position, zero), self._modulation(zero.float(), zero)
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                normed = first_norm(h, adaln)
            q, keys_values = layer.project(normed, packed)
            out.keys_values[i, :-1].view_as(keys_values).copy_(keys_values)
            if i + 1 < len(self.layers):  # nothing reads the context's last output
                h, normed = layer.finish(h, adaln, layer.attend(q, keys_values, may_attend), packed)
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
            packed, embedding, values = None, self._active_embedding(), active.gather(patches).to(dtype)
            modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
            place = active.rows(num_patches)
        else:
            packed, embedding = table.packed, table.active_embedding
            values, row, place = slot_inputs(patches, active.index, levels, table.levels, dtype)
            modulation = table.modulation(row)
        x = self._read_in(values, packed)
        for i, (layer, adaln) in enumerate(zip(self.layers, modulation.by_layer(), strict=True)):
            if i == 0:
                h, normed = embed(embedding, active.index, x, adaln)
            cache = context.keys_values[i]
            q, keys_values = layer.project(normed, packed)
            cache.index_copy_(
                0, place.flatten(), keys_values.flatten(0, 1).to(cache.dtype)
            )  # autocast may have lowered them
            attended = layer.attend(q, cache[:-1].view(batch, num_patches, -1))
            h, normed = layer.finish(h, adaln, attended, packed)
        return self.read_out(normed, values, levels, packed)

    def _embed(self, patches: Tensor, position: Tensor, role: Tensor) -> Tensor:
        """Return the tokens of patches (B, N, P) with these positions (N,) and roles (B, N)."""
        return self._read_in(patches) + self.position(position) + self.role(role)

    def _read_in(self, patches: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Return what tokens know of their patches (B, n, P) alone: (B, n, width)."""
        h = linear(self.patch_in, patches.to(self.patch_in.weight.dtype), packed)
        return h if self.config.pixel_width is None else h + self.pixel_in(patches, packed)

    def _active_embedding(self) -> Tensor:
        """Return the embedding (N, width) of an active token's position and role."""
        return self.position(torch.arange(self.grid.num_patches, device=self.role.weight.device)) + self.role.weight[1]

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
