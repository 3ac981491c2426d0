"""A transformer over patches with partial attention, see partial_transformer.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipr_fast.kernels.slot_inputs import SlotInputs, slot_inputs
from ipr_fast.models.level_embedding import LevelEmbedding
from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.models.partial_transformer import ContextCache, LevelTable, PartialTransformer, set_to_zero
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.models.pixel_networks import FLOOR, PixelEncoder, PixelHead
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import LogitPrediction, Prediction
from ipr_fast.sampling.schedule import Schedule


class PatchTransformer(PartialTransformer):
    """A Denoiser for patches (B, N, P) of `config`'s grid."""

    patch_dtype = torch.float32  # cast where the weights are of another type

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__(config)
        self.config, self.grid, self.value_range = config, config.grid, config.value_range
        self.generate_schedule = Schedule(*config.generate_schedule)
        self.refine_schedule = Schedule(*config.refine_schedule)
        width, numel = config.width, self.grid.patch_numel
        self.patch_in = nn.Linear(numel, width)
        self._add_layers(config, self.grid.grid_shape)
        if config.pixel_width is None:
            self.patch_out = nn.Linear(width, 2 * numel + 1)  # the output, variance mix, log-variance
            set_to_zero(self.patch_out)
        else:
            self.pixel_in = PixelEncoder(self.grid.channels, width, 2 * config.pixel_width)
            self.pixel_head = PixelHead(self.grid.channels, width, config.pixel_width)

    def forward(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        *,
        context: ContextCache | None = None,
        table: LevelTable | None = None,
        slots: SlotInputs | None = None,
    ) -> Prediction | LogitPrediction:
        """Predict all patches, all being active (levels (B, N)), or the active slots (levels (B, A)).

        context: from `prepare`; only the slots' tokens are computed then. Without it all tokens are, which gives the
        same numbers to rounding. table: from `tabulate`, used together with a context. slots: from `slot_inputs`, used
        together with a table; the mix may be a logit then.
        """
        if active is None:
            return self.predict(patches, levels, torch.ones_like(levels, dtype=torch.bool))
        if context is not None:
            return self._predict_slots(patches, levels, active, context, table, slots)
        num_patches = patches.shape[1]
        is_active = active.scatter(active.occupied, num_patches, fill=False)
        levels = active.scatter(levels, num_patches)
        return self.predict(patches, levels, is_active).at(active)

    def predict(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction:
        """Predict all N patches from every token's level (B, N) and role (B, N) bool, as in training.

        The level of a context token must be 0; its prediction is meaningless.
        """
        return self.read_out(self.encode(patches, levels, is_active), patches, levels)

    def read_out(
        self, features: Tensor, patches: Tensor, levels: Tensor, packed: PackedWeights | None = None
    ) -> Prediction:
        """Return the prediction of patches (B, n, P) at levels (B, n), from their features (B, n, width)."""
        if self.config.pixel_width is not None:
            return self.pixel_head(features, patches, levels, packed)
        prediction = self._read_logits(features, packed).finished()
        if self.config.output == "velocity":
            return prediction
        clean, mix, log_variance = prediction.map(lambda x: x.to(patches.dtype))  # in the place of the velocity
        return Prediction((patches - clean) / levels.clamp_min(FLOOR)[..., None], mix, log_variance)

    def _read_logits(self, features: Tensor, packed: PackedWeights | None) -> LogitPrediction:
        out = linear(self.patch_out, features, packed)
        numel = self.grid.patch_numel
        velocity, mix_logit, log_variance = out.split((numel, numel, 1), dim=-1)
        return LogitPrediction(velocity, mix_logit, log_variance.squeeze(-1))

    def _predict_slots(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches,
        context: ContextCache,
        table: LevelTable | None,
        slots: SlotInputs | None,
    ) -> Prediction | LogitPrediction:
        """Predict the active slots."""
        if table is None:
            packed, values = None, active.gather(patches).to(self.slot_dtype)
            modulation = self._modulation(levels, torch.ones_like(levels, dtype=torch.int64))
            place = active.rows(patches.shape[1])
        else:
            packed = table.packed
            inputs = slots or slot_inputs(patches, active.index, levels, table.levels, self.slot_dtype)
            values, row, place = inputs
            modulation = table.active(row)
        x = self._read_in(values, packed)
        features = self._encode_slots(x, active.index, place, modulation, context, table)
        if slots is not None and self._reads_velocity:
            return self._read_logits(features, packed)
        return self.read_out(features, values, levels, packed)

    @property
    def slot_dtype(self) -> torch.dtype:
        """The type in which the slots' patches are read."""
        if self._reads_velocity:
            return self.patch_in.weight.dtype
        return torch.float32  # the read-out divides by small levels: a rounding of half precision would grow

    def _level_embedding(self) -> nn.Module:
        return LevelEmbedding(self.config.level_features, self.width)

    def _read_in(self, values: Tensor, packed: PackedWeights | None = None) -> Tensor:
        h = linear(self.patch_in, values.to(self.patch_in.weight.dtype), packed)
        return h if self.config.pixel_width is None else h + self.pixel_in(values, packed)

    def _outer_layers(self) -> Sequence[nn.Linear]:
        if self.config.pixel_width is None:
            return self.patch_in, self.patch_out
        return self.patch_in, self.pixel_in.out, self.pixel_head.weights

    def _aligned_layers(self) -> Sequence[nn.Linear]:
        return (self.patch_out,) if self._reads_velocity else ()

    @property
    def _reads_velocity(self) -> bool:
        return self.config.pixel_width is None and self.config.output == "velocity"
