"""Trains a PatchTransformer on the samples of a task, by the draws and losses of objective.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.tasks.base import SymbolTask, Task
from ipr_fast.training.objective import Draw, Losses, compute_losses, draw
from ipr_fast.training.own_patches import OwnPatches
from ipr_fast.training.samples import SYMBOLS, check_form, check_symbols, check_values


class PatchBatch(NamedTuple):
    """Clean patches (B, N, P), their random numbers, and the symbols (B, N) that they show, if they are learnt."""

    clean: Tensor
    drawn: Draw
    symbols: Tensor | None


class PatchObjective:
    """The objective of a task's samples and a model. head: of the symbols, for a `SymbolTask` with a symbol weight.

    symbol_weight, mean_weight: as for `Losses.total`. few_active: as for `sample_roles`. own_share: as for
    `OwnPatches.replace`; `own`, if set, is where the model's own patches come from.
    """

    losses_type = Losses

    def __init__(
        self,
        task: Task,
        model: PatchTransformer,
        symbol_weight: float,
        mean_weight: float,
        few_active: float,
        own_share: float,
    ) -> None:
        self.task, self.model = task, model
        self.symbol_weight, self.mean_weight, self.few_active = symbol_weight, mean_weight, few_active
        self.own_share = own_share
        self.own: OwnPatches | None = None
        self.head: nn.Linear | None = None
        if isinstance(task, SymbolTask) and symbol_weight:
            self.head = nn.Linear(model.config.width, task.num_symbols)
        self._has_seen_values = False

    def draw(self, batch_size: int, generator: torch.Generator) -> PatchBatch:
        """Draw a batch; check its shape and dtype each time, its values the first time only."""
        symbols, grid = None, self.model.grid
        if isinstance(self.task, SymbolTask) and (self.head is not None or self.own is not None):
            samples, symbols = self.task.sample_with_symbols(batch_size, generator)
        else:
            samples = self.task.sample(batch_size, generator)
        check_form(self.task, (batch_size, *grid.sample_shape), generator.device, samples)
        if symbols is not None:
            form = (batch_size, grid.num_patches)
            check_form(self.task, form, generator.device, symbols, torch.int64, SYMBOLS)
        if not self._has_seen_values:
            check_values(self.task, samples, self.model.value_range)
            if isinstance(self.task, SymbolTask) and symbols is not None:
                check_symbols(self.task, symbols, self.task.num_symbols)
            self._has_seen_values = True
        clean = grid.to_patches(samples)
        drawn = draw(clean.shape, generator, self.few_active)
        if self.own is not None and symbols is not None:
            clean = self.own.replace(clean, symbols, drawn.levels, self.own_share, generator)
        return PatchBatch(clean, drawn, symbols)

    def losses(self, batch: PatchBatch) -> Losses:
        """Return the losses of a batch."""
        return compute_losses(self._predict, batch.clean, batch.drawn, batch.symbols, channels=self.model.grid.channels)

    def total(self, losses: Losses) -> Tensor:
        """Return what training minimises."""
        return losses.total(self.symbol_weight, self.mean_weight)

    def _predict(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> tuple[Prediction, Tensor | None]:
        features = self.model.encode(patches, levels, is_active)
        prediction = self.model.read_out(features, patches, levels)
        return prediction, None if self.head is None else self.head(features)
