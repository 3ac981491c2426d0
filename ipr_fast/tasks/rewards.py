"""Rewards of Sudoku boards, for `Metropolis`, `--accept` and search: higher is better.

Boards are tokens (B, 16) or (B, 81), the digits of their cells, or images (B, 1, 32, 32) or (B, 1, 72, 72) of
handwritten digits, which a reader reads. Another task has such rewards in its judge: `lambda x: -judge(x).imbalance`.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from ipr_fast import checks
from ipr_fast.tasks.grids import SIDES
from ipr_fast.tasks.sudoku import BoardJudge, BoardReport, DigitSudoku
from ipr_fast.tasks.token_sudoku import GridJudge

CELL = 8  # pixels a side of scikit-learn's digits


def valid_board(x: Tensor) -> Tensor:
    """Return 1 for valid boards and 0 for others: (B,) float64. Raises ValueError for other samples."""
    return _report(x).valid.double()


def minus_violations(x: Tensor) -> Tensor:
    """Return minus the violations of boards: (B,) float64, 0 for valid ones. Raises ValueError for other samples."""
    return -_report(x).violations.double()


def _report(x: Tensor) -> BoardReport:
    for side in SIDES if isinstance(x, Tensor) else ():
        if x.ndim == 2 and x.shape[1] == side**2 and not x.is_floating_point():
            return GridJudge(side)(x)
        if x.shape[1:] == (1, CELL * side, CELL * side):
            return _judge(side)(x)
    raise ValueError(
        f"this reward is of Sudoku boards, tokens (B, 16) or (B, 81) or images of {CELL}x{CELL} cells, got "
        f"{checks.described(x)}; for MNIST's digits: DigitSudoku(side, folder).judge()"
    )


@cache
def _judge(side: int) -> BoardJudge:
    return DigitSudoku(side).judge()
