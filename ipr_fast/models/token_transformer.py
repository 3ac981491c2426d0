"""A transformer over discrete tokens with partial attention, see partial_transformer.py.

A position's level is 1 where it is masked, 0 where it is not. A position that is active stays so when a step reveals
its token: the context is what was visible when the iteration began.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.models.partial_transformer import ContextCache, LevelTable, PartialTransformer, set_to_zero
from ipr_fast.models.token_transformer_config import TokenTransformerConfig
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.tokens import TokenPrediction


class TokenTransformer(PartialTransformer):
    """A TokenDenoiser for tokens (B, N) int64 of `config`'s vocabulary."""

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__(config)
        self.config, self.vocabulary, self.length = config, config.vocabulary, config.length
        ids = max(config.vocabulary_size, config.mask_id + 1)
        self.token_in = nn.Embedding(ids, config.width)
        self._add_layers(config, (config.rows, config.columns))
        self.token_out = nn.Linear(config.width, config.vocabulary_size)
        set_to_zero(self.token_out)

    def forward(
        self,
        tokens: Tensor,
        active: ActivePatches | None = None,
        *,
        context: ContextCache | None = None,
        table: LevelTable | None = None,
    ) -> TokenPrediction:
        """Predict all positions (B, N), all being active, or the active slots (B, A).

        context: from `prepare`; only the slots are computed then. Without it all positions are, which gives the same
        numbers to rounding. table: from `tabulate` at levels 0 and 1, used together with a context.
        """
        if active is None:
            return self.predict(tokens, torch.ones_like(tokens, dtype=torch.bool))
        if context is not None:
            return self._predict_slots(tokens, active, context, table)
        is_active = active.scatter(active.occupied, tokens.shape[1], fill=False)
        return TokenPrediction(active.gather(self.predict(tokens, is_active).logits))

    def predict(self, tokens: Tensor, is_active: Tensor) -> TokenPrediction:
        """Predict all N positions from every position's token and role (B, N) bool, as in training.

        A context position must not be masked; its prediction is meaningless.
        """
        return TokenPrediction(self.token_out(self.encode(tokens, self._levels(tokens), is_active)))

    def _predict_slots(
        self, tokens: Tensor, active: ActivePatches, context: ContextCache, table: LevelTable | None
    ) -> TokenPrediction:
        """Predict the active slots."""
        values = active.gather(tokens)
        levels, place = self._levels(values), active.rows(tokens.shape[1])
        if table is None:
            packed, modulation = None, self._modulation(levels, torch.ones_like(values))
        else:
            packed, modulation = table.packed, table.active(levels.long())
        x = self._read_in(values, packed)
        features = self._encode_slots(x, active.index, place, modulation, context, table)
        if active.wanted is not None and self.vocabulary.size > self.width:  # else a copy takes longer
            features = features.gather(1, active.wanted[..., None].expand(-1, -1, self.width))
        return TokenPrediction(linear(self.token_out, features, packed))

    def _levels(self, tokens: Tensor) -> Tensor:
        """Return the levels (B, n) of tokens."""
        return (tokens == self.vocabulary.mask_id).float()

    def _level_embedding(self) -> nn.Module:
        return MaskEmbedding(self.width)

    def _outer_layers(self) -> Sequence[nn.Linear]:
        return (self.token_out,)

    def _read_in(self, values: Tensor, packed: PackedWeights | None = None) -> Tensor:
        return self.token_in(values)


class MaskEmbedding(nn.Module):
    """Embedding (..., width) of the levels 0 and 1 (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(2, width)

    def forward(self, levels: Tensor) -> Tensor:
        return self.table(levels.long())
