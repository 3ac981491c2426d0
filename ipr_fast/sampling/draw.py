"""Draws tokens from a model's logits as a schedule says: temperature, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.categorical import Drawn, categorical
from ipr_fast.kernels.threshold import threshold
from ipr_fast.sampling.tokens import TokenSchedule


def draw_tokens(
    logits: Tensor,
    schedule: TokenSchedule,
    forbidden: Tensor | None,
    *,
    index: Tensor,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    seed: Tensor,
    out: Drawn | None = None,
) -> Drawn:
    """Draw a token for every slot from logits (B, A, V), -1 where there is none to draw.

    forbidden (V,) bool: ids that are not sampled. index (B, A) int32: positions, padded with -1. step (B,) int64: the
    last step that was done. out: takes what was drawn, and keeps the statistics of padding slots.
    """
    batch, slots, _ = logits.shape
    lowest = None
    if schedule.temperature and (schedule.top_k is not None or schedule.top_p < 1):
        lowest = threshold(
            logits,
            index=index,
            out=torch.empty(batch, slots, dtype=torch.float32, device=logits.device),
            temperature=schedule.temperature,
            top_k=schedule.top_k,
            top_p=schedule.top_p,
            nucleus=schedule.nucleus,
            forbidden=forbidden,
        )
    return categorical(
        logits,
        index=index,
        seed=seed,
        step=step,
        iteration=iteration,
        chain_ids=chain_ids,
        out=Drawn.empty(batch, slots, logits.device) if out is None else out,
        keep=out is not None,
        temperature=schedule.temperature,
        threshold=lowest,
        forbidden=forbidden,
    )
