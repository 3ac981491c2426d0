"""Lanes whose chains hold tokens: an iteration masks the active ones, a tick draws tokens and reveals some of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.engine.buffers import TokenSlots
from ipr_fast.engine.lanes import Lanes
from ipr_fast.engine.precomputed import guarded_call
from ipr_fast.kernels.mask_tokens import mask_tokens
from ipr_fast.kernels.reveal import reveal
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.draw import draw_tokens
from ipr_fast.sampling.tokens import TokenPrediction, TokenSampling, TokenSchedule, TokenTables, check_prediction
from ipr_fast.trace import span

SCORES = {"confidence": "odds", "margin": "gap", "entropy": "entropy"}  # the statistics by which orders compare


class TokenSettings(NamedTuple):
    """Arguments of a call that are constants in a captured graph."""

    schedule: TokenSchedule
    tf32: bool = False

    @classmethod
    def of(cls, sampling: TokenSampling, tf32: bool = False) -> TokenSettings:
        return cls(sampling.schedule, tf32)

    def sample_shape(self, model: TokenDenoiser) -> tuple[int, int]:
        return model.length, 8

    def make_lanes(self, model: TokenDenoiser, num_lanes: int, device: torch.device) -> TokenLanes:
        return TokenLanes(model, num_lanes, device, self)


class TokenLanes(Lanes):
    """Lanes for the chains of a TokenDenoiser."""

    def __init__(self, model: TokenDenoiser, num_lanes: int, device: torch.device, settings: TokenSettings) -> None:
        super().__init__(model, num_lanes, device, settings, (model.length,), torch.int64)
        strategy = settings.schedule.remasking
        self.vocabulary, self.forbidden = model.vocabulary, model.vocabulary.forbidden_on(device)
        self.keeps_psi = strategy is not None and strategy.by_confidence
        self.tables: TokenTables | None = None

    def _set_schedule(self, schedule: TokenSchedule) -> bool:
        """Tabulate the schedule, which is constant: it is one of the settings."""
        self.tables = schedule.tables(self.model.length).to(self.device)
        return self.precomputed.has_table and self.precomputed.set_levels(torch.tensor([0.0, 1.0], device="cpu"))

    def _allocate_slots(self, num_slots: int) -> TokenSlots:
        return TokenSlots.allocate(self.num_lanes, num_slots, self.device)

    def begin(
        self, num_lanes: int, num_slots: int, *, chooses: bool, initial: bool, noise: Tensor | None = None
    ) -> None:
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("mask"):
            mask_tokens(
                state.values,
                state.mask,
                index=slots.index,
                count=slots.count,
                step=state.step,
                mask_id=self.vocabulary.mask_id,
                chain_ids=state.chain_ids,
                seed=state.seed,
                choice=self.choice(state) if chooses else None,
            )
        self.prepare(num_lanes, num_slots)

    def tick(self, num_lanes: int, num_slots: int, noise: Tensor | None = None) -> TokenPrediction:
        tables, schedule = self.tables, self.settings.schedule
        assert tables is not None, "set_sampling comes first"
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        prediction = self.predict(num_lanes, num_slots)
        check_prediction(prediction, (num_lanes, num_slots, self.vocabulary.size), self.device)
        counters = {"step": state.step, "iteration": state.iteration, "chain_ids": state.chain_ids, "seed": state.seed}
        with span("draw"):
            drawn = draw_tokens(prediction.logits, schedule, self.forbidden, index=slots.index, **counters)
        with span("reveal"):
            reveal(
                state.values,
                drawn.token,
                score=None if schedule.order == "random" else getattr(drawn, SCORES[schedule.order]),
                confidence=drawn.confidence if self.keeps_psi else None,
                index=slots.index,
                count=slots.count,
                mask_id=self.vocabulary.mask_id,
                visible=tables.visible,
                reveal=tables.reveal,
                sigma=tables.sigma,
                psi=slots.psi if self.keeps_psi else None,
                **counters,
            )
        return prediction

    def predict(self, num_lanes: int, num_slots: int) -> TokenPrediction:
        """Call the model."""
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("network"), guarded_call(self.model, state, slots):
            return self.model(state.values, slots.active, **self.precomputed.arguments(num_lanes))
