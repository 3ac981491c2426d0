"""How soon a model of 9x9 boards learns the rules, with heads that begin by looking along rows, columns and boxes, and
without.

    python bench/rules.py --out FILE.json     train both for a while, write the numbers, print the table
    python bench/rules.py --report FILE.json  print the table of an earlier measurement

Both see the same boards. The question put to them: on valid boards in digits that they have not seen, some cells are
replaced by noise; how many of these does one call of the model fill with the right digit? One cell alone is always
determined by the others; guessing fills one in nine.
"""

from __future__ import annotations

from dataclasses import replace

import script
import torch

from ipr_fast.tasks.digits import DigitReader
from ipr_fast.tasks.grids import random_grids
from ipr_fast.tasks.sudoku import DigitSudoku, draw_boards
from ipr_fast.training.configs import config_of
from ipr_fast.training.trainer import Trainer, TrainSettings

SIZES = {"width": 96, "depth": 5, "num_heads": 6}
SETTINGS = TrainSettings(steps=10**6, batch_size=64, learning_rate=2e-3, ema_decay=0.998)  # so the rate stays constant
MISSING = (1, 20)  # cells
BOARDS = 200  # with so many gaps each


class Unaided(DigitSudoku):
    """The task whose models begin as they are made."""

    def initialise(self, model: torch.nn.Module) -> None:
        pass


class Gaps:
    """Boards with missing cells, and what a model fills them with."""

    def __init__(self, task: DigitSudoku) -> None:
        generator = torch.Generator().manual_seed(0)
        self.digits = random_grids(BOARDS, task.side, generator).flatten(1)
        images = draw_boards(self.digits.unflatten(1, (task.side, task.side)), task.test, generator)
        self.patches, self.reader = task.grid.to_patches(images), DigitReader(task.train)
        self.noise = torch.randn(self.patches.shape, generator=generator)
        self.order = torch.rand(self.digits.shape, generator=generator).argsort(1).argsort(1)

    @torch.no_grad()
    def filled(self, model: torch.nn.Module, missing: int) -> float:
        """The share of `missing` cells a board that the model fills right."""
        gaps = self.order < missing
        noisy = torch.where(gaps[..., None], self.noise, self.patches)
        clean = noisy - model.predict(noisy, gaps.float(), gaps).velocity
        size = self.reader.size
        return (self.reader.read(clean.unflatten(-1, (size, size))) == self.digits)[gaps].float().mean().item()


def measure(boards: int, every: int) -> dict:
    """Both arms, asked after every so many boards of training."""
    arms = {}
    for name, kind in (("looking along lines", DigitSudoku), ("at random", Unaided)):
        task = kind(9)
        task.config = replace(config_of(task), **SIZES)
        trainer, gaps, rows = Trainer(task, SETTINGS), Gaps(task), []
        while (seen := trainer.step * SETTINGS.batch_size) < boards:
            trainer.train_step()
            seen_now = seen + SETTINGS.batch_size
            if seen // every != seen_now // every or seen_now >= boards:
                shares = [gaps.filled(trainer.ema, missing) for missing in MISSING]
                rows.append([seen_now, *shares])
                print(name, *rows[-1], flush=True)
        arms[name] = rows
    return {"sizes": SIZES, "missing": MISSING, "test_boards": BOARDS, "arms": arms}


def report(results: dict) -> str:
    """Both arms as a Markdown table."""
    names = list(results["arms"])
    titles = [f"{name}, {missing} missing" for name in names for missing in results["missing"]]
    lines = [f"| boards seen | {' | '.join(titles)} |", f"| ---: |{' ---: |' * len(titles)}"]
    for rows in zip(*results["arms"].values(), strict=True):
        shares = [f"{100 * share:.0f} %" for row in rows for share in row[1:]]
        lines.append(f"| {rows[0][0]:,} | {' | '.join(shares)} |")
    sizes, about = results["sizes"], results["environment"]
    lines += [
        "",
        f"Cells filled right, of {results['test_boards']} boards; width {sizes['width']}, {sizes['depth']} layers, "
        f"{sizes['num_heads']} heads; one run each, seed 0. Measured at {about['commit']} on {about['device']}, "
        f"torch {about['torch']}, threads: {about['threads']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    number = script.at_least(1)
    script.run(
        __doc__,
        measure,
        report,
        boards={"type": number, "default": 128_000, "help": "of training, an arm (default 128000)"},
        every={"type": number, "default": 32_000, "help": "boards between questions (default 32000)"},
    )


if __name__ == "__main__":
    main()
