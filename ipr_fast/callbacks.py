"""Calls a user's callback: after each iteration of a refinement, or after each step of a generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.engine.engine import Engine
from ipr_fast.sampling import user_code
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.selection import Selection
from ipr_fast.trace import span

Callback = Callable[[int, Tensor], "Tensor | None"]


def check_callback(callback: object) -> None:
    """Raise ValueError for a callback that cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be callable, got {type(callback).__name__}")


def call_back(callback: Callback, number: int, x: Tensor, unit: str = "iteration") -> Tensor | None:
    """Call a callback. Returns the chains (B,) bool that it freezes. unit: what `number` counts."""
    name = f"callback {checks.name_of(callback)}"
    with span("callback"):
        frozen = user_code.call(name, number, callback, number, x, unit=unit)
    if frozen is None:
        return None
    holds = isinstance(frozen, Tensor) and frozen.layout == torch.strided and not frozen.is_meta
    if not isinstance(frozen, Tensor) or not holds or frozen.dtype != torch.bool or frozen.shape != (len(x),):
        where = f" ({frozen.layout}, on {frozen.device})" if isinstance(frozen, Tensor) and not holds else ""
        came = checks.described(frozen) + where
        raise ValueError(f"{name} must return None or a bool tensor of shape ({len(x)},), got {came}")
    return frozen


def generate_by_steps(
    engine: Engine | ReferenceEngine,
    selected: Selection,
    totals: Tensor,
    callback: Callable[[int], Tensor | None],
    on_share: Callable[[float], object] | None,
) -> Tensor:
    """Regenerate the selected patches or positions, one step of all chains after another, whatever wave they are in.

    totals: (B,) int64 on the CPU, each chain's steps. callback(step): called after each step; the chains that it
    returns take no further steps. Every wave begins anew for each step, so that this takes longer than `regenerate`.
    Returns which chains (B,) bool took all their steps.
    """
    slots = engine.begin_slots(selected)
    running = totals.clone()
    for step in range(int(totals.max())):
        due = (running > step).long()
        if not bool(due.any()):
            break
        engine.resume(selected, torch.full_like(due, step), due, slots, on_share=on_share)
        frozen = callback(step)
        if frozen is not None:
            running = running.where(~frozen.cpu(), running.clamp(max=step + 1))
        engine.notice_changes()
    return running == totals
