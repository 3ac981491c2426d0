"""The definition of a regeneration of tokens, one chain at a time: the specification of what the engine does.

It shares with the engine only the model, the schedule's numbers and the definition of the random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule, Vocabulary

Model = Callable[..., TokenPrediction]  # an `ipr_fast.TokenDenoiser`
TOP_KEY = 1 << 32  # keys are integers below it


class TokenNoise(NamedTuple):
    """Random numbers of one step of a chain with N positions.

    gumbel (N, V) float32; order and remask (N,) int64, keys uniform in 0..2**32-1.
    """

    gumbel: Tensor
    order: Tensor
    remask: Tensor


class Candidates(NamedTuple):
    """A token drawn for every position (N,) int64, and the model's untempered uncertainty there, (N,) float64 each.

    confidence: p, the probability of the token. odds: (1 - p) / p, the odds against it. gap: 1 - (p1 - p2), of the two
    highest probabilities. entropy: in nats. The last three fall to 0 as the model becomes certain and keep their
    relative precision there, where p rounds to 1; so positions are compared by them.
    """

    token: Tensor
    confidence: Tensor
    odds: Tensor
    gap: Tensor
    entropy: Tensor


@torch.no_grad()
def regenerate_tokens(
    model: Model,
    tokens: Tensor,
    unknown: Tensor,
    vocabulary: Vocabulary,
    schedule: TokenSchedule,
    *,
    noise: Callable[[int], TokenNoise],
) -> tuple[Tensor, Tensor]:
    """Mask the unknown positions of one chain and draw their tokens anew, given the others.

    tokens (N,) int64; unknown (N,) bool. noise(step): the step's random numbers.
    Returns the tokens (N,) and their history (T + 1, N): masked, and after each step.
    """
    if tokens.ndim != 1 or unknown.shape != tokens.shape or unknown.dtype != torch.bool:
        got = f"{tuple(tokens.shape)} and {tuple(unknown.shape)} of {unknown.dtype}"
        raise ValueError(f"tokens must be (N,) and unknown a bool (N,), got {got}")
    positions, count = unknown.nonzero().flatten().tolist(), int(unknown.sum())
    num_steps, tables, strategy = schedule.num_steps(count), schedule.tables(len(tokens)), schedule.remasking
    active = ActivePatches.from_mask(unknown[None])
    tokens = tokens.masked_fill(unknown, vocabulary.mask_id)
    revealed_with = [0.0] * len(tokens)  # the confidence of each visible active token when it was revealed
    history = [tokens]

    for step in range(num_steps):
        prediction = model(tokens[None], active)
        logits = active.scatter(prediction.logits.float(), len(tokens))[0]
        numbers = noise(step)
        drawn = draw(logits, numbers.gumbel, vocabulary, schedule)
        masked = [p for p in positions if tokens[p] == vocabulary.mask_id]
        visible = [p for p in positions if tokens[p] != vocabulary.mask_id]

        remasked = []
        if strategy is not None and tables.sigma is not None:
            sigma = tables.sigma[count, step]
            share = torch.ones(len(visible), device="cpu")
            if strategy.by_confidence and visible:
                share = torch.tensor([-revealed_with[p] for p in visible], device="cpu").softmax(0)
            thresholds = [_threshold(part * sigma) for part in share]
            remasked = [p for p, bound in zip(visible, thresholds, strict=True) if numbers.remask[p] < bound]

        if tables.visible is not None:
            number = int(tables.visible[count, step]) - len(visible) + len(remasked)
            by_order = sorted(masked, key=_order(schedule.order, drawn, numbers.order).__getitem__)
            revealed = by_order[: max(0, number)]
        else:
            assert tables.reveal is not None, "a schedule has one of the tables"
            threshold = _threshold(tables.reveal[count, step])
            revealed = [p for p in masked if numbers.order[p] < threshold]

        tokens = tokens.clone()
        for p in revealed:
            tokens[p], revealed_with[p] = drawn.token[p], float(drawn.confidence[p])
        for p in remasked:
            tokens[p] = vocabulary.mask_id
        history.append(tokens)
    return tokens, torch.stack(history)


def draw(logits: Tensor, gumbel: Tensor, vocabulary: Vocabulary, schedule: TokenSchedule) -> Candidates:
    """Draw a token for every position from logits (N, V) with noise (N, V), by Gumbel-max."""
    logits = logits.index_fill(
        1, torch.tensor(vocabulary.forbidden, dtype=torch.int64, device=logits.device), -torch.inf
    )
    if schedule.temperature:
        law = (logits / schedule.temperature).masked_fill(~restrict(logits, schedule), -torch.inf)
        token = (law + gumbel).argmax(-1)
    else:
        token = logits.argmax(-1)
    p = logits.double().softmax(-1)
    confidence, others = p.gather(1, token[:, None])[:, 0], p.scatter(1, token[:, None], 0.0).sum(-1)
    ordered = p.sort(-1, descending=True).values[:, 1:]  # all but the highest
    gap = ordered.sum(-1) + ordered[:, :1].sum(-1)
    return Candidates(token, confidence, others / confidence, gap, torch.special.entr(p).sum(-1))


def restrict(logits: Tensor, schedule: TokenSchedule) -> Tensor:
    """Return which tokens (N, V) top-k and top-p leave; tokens as probable as the last one stay in."""
    allowed = logits > -torch.inf
    if schedule.top_k is not None:
        allowed &= logits >= logits.sort(-1, descending=True).values[:, min(schedule.top_k, logits.shape[1]) - 1, None]
    if schedule.top_p < 1 and schedule.temperature:
        law = (logits.double() / schedule.temperature).masked_fill(~allowed, -torch.inf).softmax(-1)
        ordered, ids = law.sort(stable=True, dim=-1, descending=True)
        total = ordered.cumsum(-1)
        inside = total <= schedule.top_p if schedule.nucleus == "inner" else total - ordered < schedule.top_p
        inside[:, 0] = True
        last = (inside.sum(-1, keepdim=True) - 1).clamp_min(0)
        allowed &= logits >= logits.gather(1, ids.gather(1, last))
    return allowed


def _order(order: str, drawn: Candidates, keys: Tensor) -> list[float]:
    """Return a number for every position; lower ones are revealed first, ties by position."""
    scores = {"confidence": drawn.odds, "margin": drawn.gap, "entropy": drawn.entropy, "random": keys}
    return scores[order].tolist()


def _threshold(probability: Tensor) -> int:
    """Return how many keys of 2**32 make an event of this float32 probability happen."""
    return int(probability.double() * TOP_KEY)
