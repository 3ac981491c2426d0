"""The schedule's part of a tick: start the next patches, and give every slot its next level.

At step s of a chain with n active patches, T steps, block length L and starts S_k:

    due   = #{k : S_k <= s}
    start = s   for the (due - started) waiting slots of lowest log-variance (NaN is the highest), ties by slot
    next  = clamp((L - (s + 1 - start)) / L, 0, 1)          for started slots; 1 for waiting ones; 0 once s + 1 >= T

Shapes: level, next_level, log_variance (B, A) float32; start (B, A) int32, -1 while waiting; count (B,) int32; step ()
int64. The tables are those of `ScheduleTables`: steps, block (N + 1,), starts (N + 1, N), int32.
Bytes that must move: 20 B A, and 4 N of the tables for each chain, which stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advance(
    start: Tensor,
    next_level: Tensor,
    *,
    occupied: Tensor,
    count: Tensor,
    step: Tensor,
    log_variance: Tensor | None,
    steps: Tensor,
    block: Tensor,
    starts: Tensor,
) -> None:
    """Update `start` and write `next_level`; padding slots get level 0. Without log-variances slots start in order."""
    waiting = (start < 0) & occupied
    started = ((start >= 0) & occupied).sum(1, keepdim=True)
    count = count.long()
    due = (starts[count] <= step).sum(1, keepdim=True)
    if log_variance is None:
        rank = waiting.cumsum(1) - 1
    else:
        # A waiting slot of infinite or undefined uncertainty still comes before those that do not wait.
        largest = torch.finfo(torch.float32).max
        order = log_variance.float().nan_to_num(nan=largest).masked_fill(~waiting, torch.inf)
        rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    starts_now = waiting & (rank < due - started)
    start.copy_(torch.where(starts_now, step.to(start.dtype), start))

    length = block[count][:, None]
    level = ((length - (step + 1 - start)).float() / length).clamp_(0, 1)
    level = torch.where(start < 0, 1.0, level)
    running = (step + 1 < steps[count])[:, None] & occupied
    next_level.copy_(torch.where(running, level, 0.0))
