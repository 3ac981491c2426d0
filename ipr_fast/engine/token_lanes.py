"""Lanes whose chains hold tokens: an iteration masks the active ones, a tick draws tokens and reveals some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.engine.buffers import TokenSlots
from ipr_fast.engine.lanes import Lanes
from ipr_fast.engine.precomputed import guarded_call
from ipr_fast.kernels.categorical import Drawn
from ipr_fast.kernels.mask_tokens import mask_tokens
from ipr_fast.kernels.reveal import reveal
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.condition import Layout
from ipr_fast.sampling.draw import draw_tokens
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.tokens import (
    TokenPrediction,
    TokenSampling,
    TokenSchedule,
    TokenTables,
    check_prediction,
    rating,
)
from ipr_fast.trace import span

SCORES = {"confidence": "odds", "margin": "gap", "entropy": "entropy"}  # the statistics by which orders compare


class TokenSettings(NamedTuple):
    """Arguments of a call that are constants in a captured graph."""

    schedule: TokenSchedule
    tf32: bool = False
    condition: Layout | None = None
    signals: bool = False

    @classmethod
    def of(
        cls, sampling: TokenSampling, tf32: bool = False, condition: Layout | None = None, signals: bool = False
    ) -> TokenSettings:
        return cls(sampling.schedule, tf32, condition, signals)

    def sample_shape(self, model: TokenDenoiser) -> tuple[int, int]:
        return model.length, 8

    def make_lanes(self, model: TokenDenoiser, num_lanes: int, device: torch.device) -> TokenLanes:
        return TokenLanes(model, num_lanes, device, self)


class TokenLanes(Lanes):
    """Lanes for the chains of a TokenDenoiser."""

    num_signals = 2

    def __init__(self, model: TokenDenoiser, num_lanes: int, device: torch.device, settings: TokenSettings) -> None:
        super().__init__(model, num_lanes, device, settings, (model.length,), torch.int64)
        strategy = settings.schedule.remasking
        self.vocabulary, self.forbidden = model.vocabulary, model.vocabulary.forbidden_on(device)
        self.divides_sigma = strategy is not None and strategy.by_confidence
        self.by_quality = strategy is not None and strategy.by_quality
        self.tables: TokenTables | None = None

    def _set_schedule(self, schedule: TokenSchedule) -> bool:
        """Tabulate the schedule, which is constant: it is one of the settings."""
        self.tables = schedule.tables(self.model.length).to(self.device)
        return self.precomputed.has_table and self.precomputed.set_levels(torch.tensor([0.0, 1.0], device="cpu"))

    def _allocate_slots(self, num_slots: int) -> TokenSlots:
        return TokenSlots.allocate(self.num_lanes, num_slots, self.device, self.settings.signals)

    def begin(
        self,
        num_lanes: int,
        num_slots: int,
        *,
        chooses: bool,
        initial: bool,
        whole: bool = False,
        noise: Tensor | None = None,
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
            slots.hidden.copy_(slots.index)
        self.prepare(num_lanes, num_slots, whole)

    def resume(self, num_lanes: int, num_slots: int) -> None:
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        shows = slots.active.gather(state.values) != self.vocabulary.mask_id
        slots.hidden.copy_(slots.index.masked_fill(shows, -1))

    def tick(self, num_lanes: int, num_slots: int, noise: Tensor | None = None) -> TokenPrediction:
        tables, schedule = self.tables, self.settings.schedule
        assert tables is not None, "set_sampling comes first"
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        wanted = self._wanted(slots.hidden) if self.eager and self.device.type == "cpu" else None
        prediction = self.predict(num_lanes, num_slots, wanted)
        check_prediction(prediction, (num_lanes, num_slots, self.vocabulary.size), self.device, wanted)
        counters = {"step": state.step, "iteration": state.iteration, "chain_ids": state.chain_ids, "seed": state.seed}
        with span("draw"):
            drawn = self._draw(prediction.logits, slots, wanted, counters)
        psi = None
        if self.divides_sigma:
            psi = rating(prediction) if self.by_quality else slots.psi
        with span("reveal"):
            reveal(
                state.values,
                drawn.token,
                score=None if schedule.order == "random" else getattr(drawn, SCORES[schedule.order]),
                confidence=drawn.confidence if psi is slots.psi else None,
                index=slots.index,
                count=slots.count,
                mask_id=self.vocabulary.mask_id,
                visible=tables.visible,
                reveal=tables.reveal,
                sigma=tables.sigma,
                psi=psi,
                hidden=slots.hidden,
                **counters,
            )
        return prediction

    def _wanted(self, hidden: Tensor) -> Tensor | None:
        """Return the slots (W, most masked ones of a lane) that are masked, and others behind them; None for all."""
        shows = hidden < 0
        number = max(1, hidden.shape[1] - int(shows.sum(1).min()))
        return None if number == hidden.shape[1] else shows.sort(dim=1, stable=True).indices[:, :number]

    def _draw(self, logits: Tensor, slots: TokenSlots, wanted: Tensor | None, counters: dict[str, Tensor]) -> Drawn:
        """Draw a token for every masked slot, from the logits of the slots or of the wanted ones alone.

        Where the settings ask for signals, the statistics of the other slots are those of their last draw: the step in
        which they were revealed.
        """
        schedule, hidden, kept = self.settings.schedule, slots.hidden, slots.drawn
        if wanted is None:
            return draw_tokens(logits, schedule, self.forbidden, index=hidden, out=kept, **counters)
        if logits.shape[1] > wanted.shape[1]:
            first = torch.arange(len(wanted), device=wanted.device)[:, None] * logits.shape[1]
            logits = logits.flatten(0, 1).index_select(0, (wanted + first).flatten()).unflatten(0, wanted.shape)
        drawn = draw_tokens(logits, schedule, self.forbidden, index=hidden.gather(1, wanted), out=None, **counters)

        def spread(values: Tensor, other: int) -> Tensor:
            return values.new_full(hidden.shape, other).scatter_(1, wanted, values)

        spread_out = Drawn(spread(drawn.token, -1), *(spread(values, 0) for values in drawn[1:]))
        for own, new in zip(kept or (), spread_out, strict=False):
            own.copy_(torch.where(hidden >= 0, new, own))
        return spread_out

    def signals(self, num_slots: int) -> tuple[Tensor, ...]:
        drawn = self.slots(num_slots).drawn
        assert drawn is not None, "the settings ask for signals"
        return drawn.odds.log1p(), drawn.entropy

    def waiting(self, values: Tensor, selection: Selection) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().waiting(values.masked_fill(selection.mask, self.vocabulary.mask_id), selection)

    def carried(self, num_slots: int) -> tuple[Tensor, ...]:
        keeps_psi = self.divides_sigma and not self.by_quality
        return (self.slots(num_slots).psi,) if keeps_psi else ()

    def predict(self, num_lanes: int, num_slots: int, wanted: Tensor | None = None) -> TokenPrediction:
        """Call the model. wanted: slots whose logits alone matter."""
        num_lanes = self.precomputed.lanes_called(num_lanes)
        state, slots = self.state.first(num_lanes), self.slots(num_slots).first(num_lanes)
        with span("network"), guarded_call(self.model, state, slots):
            active = replace(slots.active, wanted=wanted)
            return self.model(state.values, active, **self.precomputed.arguments(num_lanes, state))
