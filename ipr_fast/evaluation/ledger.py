"""The model calls that chains have spent, and the best boards that each has found within each of its budgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNKNOWN = 2**31  # violations of a board that was not judged yet


class Ledger:
    """The accounts of B chains, whose budgets are multiples of their own pass.

    passes (B,) int64: the calls of a pass. multiples: K of them, ascending.
    spent (B,): calls so far. fewest (K, B): the fewest violations of the boards within each budget. judged (K, B): how
    many boards these are.
    """

    def __init__(self, passes: Tensor, multiples: Sequence[int]) -> None:
        self.limits = torch.tensor(multiples, device=passes.device)[:, None] * passes
        self.spent = torch.zeros_like(passes)
        self.fewest, self.judged = torch.full_like(self.limits, UNKNOWN), torch.zeros_like(self.limits)

    def note(self, chains: Tensor, calls: Tensor, violations: Tensor) -> None:
        """Note that chains (R,), each once, have spent calls (R,) on boards of so many violations (R,)."""
        self.spent[chains] += calls
        within = self.affords(chains, 0)
        self.fewest[:, chains] = self.fewest[:, chains].minimum(torch.where(within, violations, UNKNOWN))
        self.judged[:, chains] += within

    def affords(self, chains: Tensor, calls: Tensor | int) -> Tensor:
        """Return whether each budget has so many calls (R,) left: (K, R) bool."""
        return self.spent[chains] + calls <= self.limits[:, chains]
