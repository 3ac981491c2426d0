"""A transformer over patches with partial attention.

Tokens are patches. A token is either context (clean, given) or active (being regenerated). Context tokens attend to
context tokens only, active tokens to all. So nothing that an active token does reaches the context: the context's keys
and values stay the same for a whole iteration. `prepare` computes them once, and each call with that context runs the
network for the A active tokens only. The model is trained under the same rule, so this is exact.

Each token's level and role enter through LayerNorm's scale, shift and a gate (Peebles & Xie 2023), from one
projection that all layers share plus a learned table for each layer (Chen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipr_fast.kernels.gated_sum import gated_sum
from ipr_fast.kernels.modulated_norm import modulated_layer_norm
from ipr_fast.kernels.partial_attention import partial_attention
from ipr_fast.models.config_checks import MOST_LAYERS, positive_int, schedule_pair, square_grid
from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.trace import span

EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True)
class PatchTransformerConfig:
    """The shape of a PatchTransformer. `box_size` > 0 adds an embedding of the box that a patch lies in (Sudoku)."""

    channels: int
    image_size: int
    patch_size: int
    width: int = 96
    depth: int = 5
    num_heads: int = 6
    mlp_ratio: int = 4
    box_size: int = 0
    level_features: int = 64
    generate_schedule: tuple[int, float] = (3, 0.0)
    refine_schedule: tuple[int, float] = (10, 0.8)

    def __post_init__(self) -> None:
        square_grid(self.channels, self.image_size, self.patch_size)
        for name in ("width", "num_heads", "mlp_ratio", "level_features"):
            positive_int(name, getattr(self, name))
        positive_int("depth", self.depth, MOST_LAYERS)
        if self.width % self.num_heads or self.level_features % 2:
            raise ValueError(
                f"num_heads must divide width and level_features be even, got {self.num_heads}, {self.width} and "
                f"{self.level_features}"
            )
        size = self.box_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (size and self.grid_size % size):
            raise ValueError(f"box_size must be 0 or divide the grid's {self.grid_size} patches, got {self.box_size!r}")
        for name in ("generate_schedule", "refine_schedule"):
            object.__setattr__(self, name, schedule_pair(name, getattr(self, name)))

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size

    def to_dict(self) -> dict:
        return asdict(self)


class ContextCache(NamedTuple):
    """Each layer's keys beside its values, (depth, B * N + 1, 2 width); the last row is spare, for padding slots."""

    keys_values: Tensor
    num_patches: int

    def first(self, chains: int) -> ContextCache:
        """The context of the first chains. Its spare row is one of the next chain's, whose context is lost by use."""
        rows = chains * self.num_patches + 1
        return ContextCache(self.keys_values[:, :rows], self.num_patches)


class Scales(NamedTuple):
    """A layer's modulation of tokens (B, n): each (B, n, width), or (1, 1, width) for all tokens the same; or each a
    table (R, width), with the tokens' rows (B, n).
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor
    mlp_scale: Tensor
    mlp_shift: Tensor
    mlp_gate: Tensor
    row: Tensor | None


class Modulation(NamedTuple):
    """What levels and roles make of tokens: of each layer (..., 6 width), and of the read-out (..., 2 width).

    row: where those are tables, each token's row of them.
    """

    depth: int
    of_layer: Callable[[int], Tensor]
    out: Tensor
    row: Tensor | None = None

    def of_layers(self) -> Iterator[Scales]:
        """Those of each layer, made when its turn comes."""
        return (Scales(*self.of_layer(i).chunk(6, dim=-1), self.row) for i in range(self.depth))


class LevelTable(NamedTuple):
    """The modulation of active tokens by level: levels (R,) ascending, layers (depth, R, 6 width), out (R, 2 width).

    And what depends on weights alone: the embedding of each place (N, width) of an active token, and weights as a CPU
    likes to read them.
    """

    levels: Tensor
    layers: Tensor
    out: Tensor
    places: Tensor
    packed: PackedWeights

    def at(self, levels: Tensor) -> Modulation:
        """For tokens whose levels (...) are among those of the table."""
        row = torch.searchsorted(self.levels, levels)
        return Modulation(len(self.layers), lambda i: self.layers[i], self.out, row)


class PatchTransformer(nn.Module):
    """A Denoiser for patches (B, N, P) of `config`'s grid; see the module's text for its attention rule."""

    value_range = (-1.0, 1.0)  # of the samples that it is trained on

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = square_grid(config.channels, config.image_size, config.patch_size)
        self.generate_schedule = Schedule(*config.generate_schedule)
        self.refine_schedule = Schedule(*config.refine_schedule)
        width, numel = config.width, self.grid.patch_numel
        self.patch_in = nn.Linear(numel, width)
        self.position = PositionEmbedding(self.grid, width, config.box_size)
        self.role = nn.Embedding(2, width)  # 0 context, 1 active
        self.condition = LevelEmbedding(config.level_features, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(Layer(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, 2 * numel + 1)  # velocity, variance mix, log-variance
        for layer in (self.modulation, self.modulation_out, self.patch_out):
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
        """Predict all patches (levels (B, N), every one active), or the active slots (levels (B, A)).

        With `context` from `prepare` only the slots' tokens are computed; without it, all tokens are: the same numbers
        to rounding, and slower. With a context, `table` from `tabulate` saves embedding the levels again.
        """
        if active is None:
            return self.predict(patches, levels, torch.ones_like(levels, dtype=torch.bool))
        if context is not None:
            if table is not None:
                return self._predict_slots(patches, active, table.at(levels), table.places, context, table.packed)
            modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
            return self._predict_slots(patches, active, modulation, self._places(), context)
        num_patches = patches.shape[1]
        is_active = active.scatter(active.occupied, num_patches, fill=False)
        levels = active.scatter(levels, num_patches)
        return self.predict(patches, levels, is_active).at(active)

    def predict(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction:
        """Predict all N patches, given every token's level (B, N) and role (B, N) bool; the form used in training.

        A context token's level must be 0. Its prediction is computed and means nothing.
        """
        position = torch.arange(patches.shape[1], device=patches.device)
        h, modulation = self._embed(patches, position, is_active.long()), self._modulation(levels, is_active.long())
        may_attend = is_active[:, None, :, None] | ~is_active[:, None, None, :]
        for layer, scales in zip(self.layers, modulation.of_layers(), strict=True):
            q, keys_values = layer.project(h, scales)
            h = layer.finish(h, scales, layer.attend(q, keys_values, may_attend))
        return self._read_out(h, modulation)

    def tabulate(self, levels: Tensor, out: LevelTable | None = None) -> LevelTable:
        """What an active token's level (R,) makes of it in each layer: computed here once, then looked up."""
        modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
        layers = torch.stack([modulation.of_layer(i) for i in range(modulation.depth)])
        new = (levels, layers, modulation.out, self._places())
        if out is None:
            out = LevelTable(*(tensor.clone() for tensor in new), PackedWeights())
        else:
            for own, tensor in zip(out, new, strict=False):
                own.copy_(tensor)
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
        """The context's keys and values; rows of active patches hold nothing of use until a call overwrites them."""
        packed = None if table is None else table.packed
        batch, num_patches, _ = patches.shape
        if out is None:
            shape = (self.config.depth, batch * num_patches + 1, 2 * self.config.width)
            empty = torch.zeros(shape, dtype=self.patch_in.weight.dtype, device=patches.device)
            out = ContextCache(empty, num_patches)
        is_active = active.scatter(active.occupied, num_patches, fill=False)
        # A chain without context lets its tokens attend to each other, since a softmax over nothing is NaN.
        may_attend = (~is_active | is_active.all(1, keepdim=True))[:, None, None, :]
        position = torch.arange(num_patches, device=patches.device)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=patches.device)
        h, modulation = self._embed(patches, position, zero), self._modulation(zero.float(), zero)  # the same for all
        for i, (layer, scales) in enumerate(zip(self.layers, modulation.of_layers(), strict=True)):
            q, keys_values = layer.project(h, scales, packed)
            out.keys_values[i, :-1].view_as(keys_values).copy_(keys_values)
            if i + 1 < len(self.layers):  # nothing reads the context's last output
                h = layer.finish(h, scales, layer.attend(q, keys_values, may_attend), packed)
        return out

    def _predict_slots(
        self,
        patches: Tensor,
        active: ActivePatches,
        modulation: Modulation,
        places: Tensor,
        context: ContextCache,
        packed: PackedWeights | None = None,
    ) -> Prediction:
        batch, num_patches = patches.shape[:2]
        rows = active.rows(num_patches).flatten()
        h = linear(self.patch_in, active.gather(patches).to(self.patch_in.weight.dtype), packed)
        h = h + F.embedding(active.index.clamp(min=0), places)
        for i, (layer, scales) in enumerate(zip(self.layers, modulation.of_layers(), strict=True)):
            cache = context.keys_values[i]
            q, keys_values = layer.project(h, scales, packed)
            cache.index_copy_(0, rows, keys_values.flatten(0, 1).to(cache.dtype))  # autocast may have lowered them
            attended = layer.attend(q, cache[:-1].view(batch, num_patches, -1))
            h = layer.finish(h, scales, attended, packed)
        return self._read_out(h, modulation, packed)

    def _embed(self, patches: Tensor, position: Tensor, role: Tensor) -> Tensor:
        """Tokens of patches (B, n, P) at positions (n,) or (B, n), of roles (B, n)."""
        return self.patch_in(patches.to(self.patch_in.weight.dtype)) + self.position(position) + self.role(role)

    def _places(self) -> Tensor:
        """What an active token is told of its place, (N, width)."""
        return self.position(torch.arange(self.grid.num_patches, device=self.role.weight.device)) + self.role.weight[1]

    def _modulation(self, levels: Tensor, role: Tensor) -> Modulation:
        """The modulation of tokens with these levels and roles (...)."""
        condition = F.silu(self.condition(levels) + self.role(role))
        shared, tables = self.modulation(condition), [layer.table for layer in self.layers]
        return Modulation(len(tables), lambda i: shared + tables[i], self.modulation_out(condition))

    def _read_out(self, h: Tensor, modulation: Modulation, packed: PackedWeights | None = None) -> Prediction:
        scale, shift = modulation.out.chunk(2, dim=-1)
        out = linear(self.patch_out, _norm(h, scale, shift, modulation.row), packed)
        numel = self.grid.patch_numel
        velocity, mix, log_variance = out.split((numel, numel, 1), dim=-1)
        return Prediction(velocity, mix.sigmoid(), log_variance.squeeze(-1))


class Layer(nn.Module):
    """Attention and an MLP, each with modulated norm and gate; split so that keys and values can come from a cache."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)
        self.table = nn.Parameter(torch.randn(6 * width) * width**-0.5)

    def project(self, h: Tensor, by: Scales, packed: PackedWeights | None = None) -> tuple[Tensor, Tensor]:
        """Queries (B, n, width), and keys beside values (B, n, 2 width), of tokens h (B, n, width)."""
        width = h.shape[-1]
        out = linear(self.qkv, _norm(h, by.scale, by.shift, by.row), packed)
        return out[..., :width], out[..., width:]

    def attend(self, q: Tensor, keys_values: Tensor, may_attend: Tensor | None = None) -> Tensor:
        """Attention of tokens (B, n, width) over keys beside values (B, m, 2 width)."""
        k, v = keys_values.chunk(2, dim=-1)
        if may_attend is None:
            with span("partial_attention"):
                return partial_attention(q, k, v, heads=self.num_heads)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if q.is_cuda or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend).transpose(1, 2).flatten(2)
        with torch.autocast(q.device.type, enabled=False):  # on a CPU the gradient in bfloat16 takes six times as long
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=may_attend)
        return out.transpose(1, 2).flatten(2)

    def finish(self, h: Tensor, by: Scales, attended: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """The layer's output (B, n, width), given its input and what the tokens have attended to."""
        h = _add(h, by.gate, linear(self.attention_out, attended, packed), by.row)
        hidden = linear(self.mlp_in, _norm(h, by.mlp_scale, by.mlp_shift, by.row), packed, gelu=True)
        return _add(h, by.mlp_gate, linear(self.mlp_out, hidden, packed), by.row)


class PositionEmbedding(nn.Module):
    """Learned embeddings of a patch's row, column and, where there are boxes, its box."""

    def __init__(self, grid: PatchGrid, width: int, box_size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(grid.grid_h, width) * 0.5)
        self.columns = nn.Parameter(torch.randn(grid.grid_w, width) * 0.5)
        self.box_size, self.boxes = box_size, None
        if box_size:
            self.boxes = nn.Parameter(torch.randn(grid.num_patches // box_size**2, width) * 0.5)

    def forward(self, position: Tensor) -> Tensor:
        table = self.rows[:, None] + self.columns
        if self.boxes is not None:
            size = self.box_size
            boxes = self.boxes.view(len(self.rows) // size, 1, len(self.columns) // size, 1, -1)
            table = table + boxes.expand(-1, size, -1, size, -1).reshape(table.shape)
        return F.embedding(position, table.flatten(0, 1))


class LevelEmbedding(nn.Module):
    """Sinusoidal features of a level in [0, 1], then a small MLP."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, levels: Tensor) -> Tensor:
        half = self.features // 2
        index = torch.arange(half, dtype=torch.float32, device=levels.device)
        frequencies = 1000.0 * torch.exp(index * (-math.log(10000.0) / half))
        angle = levels.float()[..., None] * frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def _norm(h: Tensor, scale: Tensor, shift: Tensor, row: Tensor | None) -> Tensor:
    with span("layer_norm"):
        return modulated_layer_norm(h, scale, shift, eps=EPS, row=row)


def _add(h: Tensor, gate: Tensor, x: Tensor, row: Tensor | None) -> Tensor:
    with span("gated_sum"):
        return gated_sum(h, gate, x, row=row)
