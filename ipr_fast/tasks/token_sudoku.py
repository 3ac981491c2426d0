"""Sudoku boards of tokens: a token is the digit of a cell, 0 an empty (masked) one."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.tokens import Vocabulary
from ipr_fast.tasks.grids import GridSource, box_side
from ipr_fast.tasks.sudoku import BoardReport, check_grids


class GridJudge:
    """Judges boards of tokens by the rules."""

    note = ""

    def __init__(self, side: int) -> None:
        self.side = side

    def read(self, tokens: Tensor) -> Tensor:
        """Return the digits of boards (B, N): (B, n, n). Raises ValueError for another shape."""
        checks.judged(self, tokens, self.side**2)
        return tokens.unflatten(1, (self.side, self.side))

    def __call__(self, tokens: Tensor) -> BoardReport:
        """Judge boards (B, N) of any integers."""
        return check_grids(self.read(tokens))


class TokenSudoku:
    """The task of Sudoku boards of tokens, of side 4 or 9."""

    noun, adjective = "board", "valid"

    def __init__(self, side: int) -> None:
        box_side(side)
        self.side, self.name = side, f"token-sudoku-{side}x{side}"
        self.vocabulary, self.length = Vocabulary(side + 1, mask_id=0), side * side
        self._grids = GridSource(side)

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw random valid boards (B, N) int64, on the generator's device."""
        checks.integer("batch_size", batch_size, 0)
        return self._grids.draw(batch_size, generator).flatten(1)

    def judge(self) -> GridJudge:
        """Return a judge of boards."""
        return GridJudge(self.side)
