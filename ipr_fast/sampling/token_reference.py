"""The definition of a regeneration of tokens, one chain at a time: the specification of what the engine does.

It shares with the engine the model, the schedule's numbers, the definition of the random numbers and `draw_tokens`,
with which tests compare `gumbel_max`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels.philox import STREAM_ORDER, STREAM_REMASK, seed_tensor, step_keys
from ipr_fast.sampling import user_code
from ipr_fast.sampling.condition import Condition, call_arguments
from ipr_fast.sampling.draw import draw_tokens
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule, Vocabulary, check_prediction, rating

Model = Callable[..., TokenPrediction]  # an `ipr_fast.TokenDenoiser`
TOP_KEY = 1 << 32  # keys are integers below it
KEY_STREAMS = STREAM_ORDER, STREAM_REMASK


class Keys(NamedTuple):
    """Random numbers of one step of a chain: order and remask (N,) int64, uniform in 0..2**32-1."""

    order: Tensor
    remask: Tensor


class Certainty(NamedTuple):
    """How certain a model is of tokens (N,), untempered: (N,) float64 each.

    confidence: p, the probability of the token. odds: (1 - p) / p, the odds against it. gap: 1 - (p1 - p2), of the two
    highest probabilities. entropy: in nats. The last three fall to 0 as the model becomes certain and keep their
    relative precision there, where p rounds to 1; so positions are compared by them.
    """

    confidence: Tensor
    odds: Tensor
    gap: Tensor
    entropy: Tensor

    @classmethod
    def zeros(cls, length: int, device: torch.device | str = "cpu") -> Certainty:
        return cls(*torch.zeros(4, length, dtype=torch.float64, device=device))


@torch.no_grad()
def regenerate_tokens(
    model: Model,
    tokens: Tensor,
    unknown: Tensor,
    vocabulary: Vocabulary,
    schedule: TokenSchedule,
    *,
    draw: Callable[[Tensor, int], Tensor],
    keys: Callable[[int], Keys],
    steps: range | None = None,
    when_revealed: Certainty | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask the unknown positions of one chain and draw their tokens anew, given the others.

    tokens (N,) int64; unknown (N,) bool. draw(logits, step): tokens (N,) drawn from logits (N, V); -1 for none.
    keys(step): the step's other random numbers. steps: go on from `tokens` with these steps only, nothing is masked.
    when_revealed: the certainty of each token in the step that revealed it, updated.
    Returns the tokens (N,) and their history (T + 1, N): masked, and after each step.
    """
    if tokens.ndim != 1 or unknown.shape != tokens.shape or unknown.dtype != torch.bool:
        got = f"{tuple(tokens.shape)} and {tuple(unknown.shape)} of {unknown.dtype}"
        raise ValueError(f"tokens must be (N,) and unknown a bool (N,), got {got}")
    positions, count = unknown.nonzero().flatten().tolist(), int(unknown.sum())
    num_steps, tables, strategy = schedule.num_steps(count), schedule.tables(len(tokens)), schedule.remasking
    active = ActivePatches.from_mask(unknown[None])
    if steps is None:
        tokens, steps = tokens.masked_fill(unknown, vocabulary.mask_id), range(num_steps)
    when_revealed = Certainty.zeros(len(tokens)) if when_revealed is None else when_revealed
    history = [tokens]

    for step in steps:
        prediction = model(tokens[None], active)
        logits = active.scatter(prediction.logits.float(), len(tokens))[0]
        drawn, numbers = draw(logits, step), keys(step)
        certainty = certainty_of(logits, drawn, vocabulary)
        masked = [p for p in positions if tokens[p] == vocabulary.mask_id]
        visible = [p for p in positions if tokens[p] != vocabulary.mask_id]

        remasked = []
        if strategy is not None and tables.sigma is not None:
            sigma = tables.sigma[count, step]
            share = torch.ones(len(visible), dtype=torch.float32, device="cpu")
            if strategy.by_confidence and visible:
                psi = when_revealed.confidence.tolist()
                if strategy.by_quality:
                    psi = active.scatter(rating(prediction), len(tokens))[0].tolist()
                share = torch.tensor([-psi[p] for p in visible], dtype=torch.float32, device="cpu").softmax(0)
            thresholds = [_threshold(part * sigma) for part in share]
            remasked = [p for p, bound in zip(visible, thresholds, strict=True) if numbers.remask[p] < bound]

        if tables.visible is not None:
            number = int(tables.visible[count, step]) - len(visible) + len(remasked)
            candidates = [p for p in masked if drawn[p] >= 0]
            by_order = sorted(candidates, key=_order(schedule.order, certainty, numbers.order).__getitem__)
            revealed = by_order[: max(0, number)]
        else:
            assert tables.reveal is not None, "a schedule has one of the tables"
            threshold = _threshold(tables.reveal[count, step])
            revealed = [p for p in masked if drawn[p] >= 0 and numbers.order[p] < threshold]

        tokens = tokens.clone()
        for p in revealed:
            tokens[p] = drawn[p]
            for kept, now in zip(when_revealed, certainty, strict=True):
                kept[p] = now[p]
        for p in remasked:
            tokens[p] = vocabulary.mask_id
        history.append(tokens)
    return tokens, torch.stack(history)


def certainty_of(logits: Tensor, token: Tensor, vocabulary: Vocabulary) -> Certainty:
    """Return the certainty of a token (N,) at every position, from logits (N, V)."""
    p, token = _allowed(logits, vocabulary).double().softmax(-1), token.clamp_min(0)[:, None]
    confidence, others = p.gather(1, token)[:, 0], p.scatter(1, token, 0.0).sum(-1)
    ordered = p.sort(-1, descending=True).values[:, 1:]  # all but the highest
    gap = ordered.sum(-1) + ordered[:, :1].sum(-1)
    return Certainty(confidence, others / confidence, gap, torch.special.entr(p).sum(-1))


def gumbel_max(logits: Tensor, gumbel: Tensor, vocabulary: Vocabulary, schedule: TokenSchedule) -> Tensor:
    """Draw a token for every position from logits (N, V) with Gumbel numbers (N, V): (N,) int64."""
    logits = _allowed(logits, vocabulary)
    if not schedule.temperature:
        return logits.argmax(-1)
    law = (logits / schedule.temperature).masked_fill(~restrict(logits, schedule), -torch.inf)
    return (law + gumbel).argmax(-1)


def _allowed(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    return logits.index_fill(1, torch.tensor(vocabulary.forbidden, dtype=torch.int64, device=logits.device), -torch.inf)


def restrict(logits: Tensor, schedule: TokenSchedule) -> Tensor:
    """Return which tokens (N, V) top-k and top-p leave; equally probable ones stay or leave together."""
    larger = logits[:, None, :] > logits[:, :, None]  # (N, V, W): w is more probable than v
    allowed = logits > -torch.inf
    if schedule.top_k is not None:
        allowed &= larger.sum(-1) < schedule.top_k
    if schedule.top_p < 1:
        law = (logits.double() / schedule.temperature).masked_fill(~allowed, -torch.inf).softmax(-1)[:, None, :]
        as_large = logits[:, None, :] >= logits[:, :, None]
        if schedule.nucleus == "inner":
            allowed &= ((law * as_large).sum(-1) <= schedule.top_p) | ~larger.any(-1)
        else:
            allowed &= (law * larger).sum(-1) < schedule.top_p
    return allowed


def _order(order: str, certainty: Certainty, keys: Tensor) -> list[float]:
    """Return a number for every position; lower ones are revealed first, ties by position."""
    scores = {"confidence": certainty.odds, "margin": certainty.gap, "entropy": certainty.entropy, "random": keys}
    return scores[order].tolist()


def _threshold(probability: Tensor) -> int:
    """Return how many keys of 2**32 make an event of this float32 probability happen."""
    return int(probability.double() * TOP_KEY)


class TokenReferenceEngine(ReferenceEngine):
    """Runs chains one after another through `regenerate_tokens`, with the engine's random numbers and its interface."""

    dtype, num_signals = torch.int64, 2

    def begin_slots(self, selection: Selection) -> tuple[Tensor, ...]:
        """See `Engine.begin_slots`."""
        mask, strategy = selection.mask, self.sampling.schedule.remasking
        self.values = self.values.masked_fill(mask, self.model.vocabulary.mask_id)
        if strategy is None or not strategy.by_confidence or strategy.by_quality:
            return ()
        return (torch.zeros(len(mask), max(selection.counts.tolist()), dtype=torch.float32, device=mask.device),)

    def _resume_chain(
        self, chain: int, unknown: Tensor, begin: int, number: int, slots: tuple[Tensor, ...], initial: bool
    ) -> None:
        """See `ReferenceEngine._resume_chain`; slots: the confidence when revealed, of a schedule that needs it."""
        ids, when_revealed = unknown.nonzero().flatten(), Certainty.zeros(len(unknown), unknown.device)
        for psi in slots:
            when_revealed.confidence[ids] = psi[: len(ids)].double()
        self.values[chain] = self._steps(chain, unknown, range(begin, begin + number), when_revealed)
        for psi in slots:
            psi[: len(ids)] = when_revealed.confidence[ids].float()

    def _regenerate_chain(self, chain: int, unknown: Tensor, use_initial_noise: bool) -> Tensor:
        when_revealed = Certainty.zeros(len(unknown), unknown.device)
        tokens = self._steps(chain, unknown, None, when_revealed)
        if self.signals is not None:
            told = when_revealed.odds.log1p(), when_revealed.entropy
            for kept, new in zip(self.signals.present, told, strict=True):
                kept[chain] = torch.where(unknown, new.float(), kept[chain])
        return tokens

    def _steps(self, chain: int, unknown: Tensor, steps: range | None, when_revealed: Certainty) -> Tensor:
        """Do these steps of a chain's regeneration; None: all, from the mask."""
        schedule, chain_id, device = self.sampling.schedule, self.chain_ids[chain : chain + 1], unknown.device
        seed, iteration, vocabulary = self.sampling.seed, self.iteration, self.model.vocabulary
        positions = torch.arange(len(unknown), dtype=torch.int32, device=device)[None]

        def draw(logits: Tensor, step: int) -> Tensor:
            drawn = draw_tokens(
                logits[None],
                schedule,
                vocabulary.forbidden_on(device),
                index=positions,
                step=torch.full((1,), step - 1, device=device),
                iteration=iteration,
                chain_ids=chain_id,
                seed=seed_tensor(seed, device),
            )
            return drawn.token[0]

        def keys(step: int) -> Keys:
            each = (step_keys(seed, stream, step, iteration, chain_id, positions)[0] for stream in KEY_STREAMS)
            return Keys(*each)

        tokens, call = self.values[chain], partial(self._call, self._condition_of(chain))
        tokens, _ = regenerate_tokens(
            call,
            tokens,
            unknown,
            vocabulary,
            schedule,
            draw=draw,
            keys=keys,
            steps=steps,
            when_revealed=when_revealed,
        )
        return tokens

    def _call(self, condition: Condition | None, tokens: Tensor, active: ActivePatches) -> TokenPrediction:
        inputs = {"tokens": tokens, "active.index": active.index, "active.count": active.count}
        with user_code.model_call(self.model, **inputs, **({} if condition is None else condition.named)):
            prediction: TokenPrediction = self.model(tokens, active, **call_arguments(condition))
        check_prediction(prediction, (*active.index.shape, self.model.vocabulary.size), tokens.device)
        return prediction
