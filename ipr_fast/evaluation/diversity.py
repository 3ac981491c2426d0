"""Does refinement make all boards alike? How evenly valid boards cover the 288 grids, before and after.

    python bench/diversity.py --out FILE.json     measure, print, and write the numbers
    python bench/diversity.py --report FILE.json  print an earlier measurement

Each valid board shows one of the 288 grids of side 4, which the training data hold equally often. The chi-square
statistic of the counts against that has 287 degrees of freedom: a sampler that is right gives 287 +- 24.
"""

from __future__ import annotations

from pathlib import Path

import script
from torch import Tensor

import ipr_fast
from ipr_fast.tasks.grids import all_grids
from ipr_fast.tasks.sudoku import BoardJudge, DigitSudoku, check_grids, read_boards

SEED, ITERS = 0, 20
RESULTS = Path(__file__).parent / "results" / "diversity-digit-sudoku-4x4.json"


def coverage(boards: Tensor, judge: BoardJudge) -> dict:
    """How the valid ones of boards (B, 1, H, W) spread over the grids."""
    grids = all_grids(4).flatten(1)
    shown = read_boards(boards, judge.reader, 4)
    valid = shown[check_grids(shown).valid].flatten(1)
    count = (valid[:, None] == grids).all(-1).sum(0).double()
    expected = len(valid) / len(grids)
    return {
        "valid": len(valid),
        "distinct": int((count > 0).sum()),
        "distinct_if_uniform": len(grids) * (1 - (1 - 1 / len(grids)) ** len(valid)),
        "chi_square": ((count - expected) ** 2 / expected).sum().item(),
        "degrees_of_freedom": len(grids) - 1,
    }


def measure(boards: int) -> dict:
    model, judge = ipr_fast.load_model("digit-sudoku-4x4"), DigitSudoku(4).judge()
    x = ipr_fast.generate_batch(boards, model=model, seed=SEED, progress=True)
    refined = ipr_fast.refine_batch(x, ipr_fast.random_patches(), ITERS, model=model, seed=SEED, progress=True)
    changed = read_boards(x, judge.reader, 4) != read_boards(refined, judge.reader, 4)
    return {
        "boards": boards,
        "iterations": ITERS,
        "one pass": coverage(x, judge),
        "refined": coverage(refined, judge),
        "cells_with_another_digit": changed.double().mean().item(),
    }


def report(results: dict) -> str:
    """The measurement in one sentence."""

    def words(name: str) -> str:
        c = results[name]
        return (
            f"{c['valid']:,} valid boards show {c['distinct']} of the 288 grids "
            f"({c['distinct_if_uniform']:.0f} expected of uniform draws; chi-square {c['chi_square']:.0f})"
        )

    changed = 100 * results["cells_with_another_digit"]
    return (
        f"After one pass, {words('one pass')}; after {results['iterations']} iterations, {words('refined')}. "
        f"{changed:.1f} % of the cells show another digit than before."
    )


def main() -> None:
    boards = {"type": script.at_least(1), "default": 2048, "help": "default 2048"}
    script.run(__doc__, measure, report, boards=boards)


if __name__ == "__main__":
    main()
