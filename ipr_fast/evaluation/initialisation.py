"""Initialisation: how soon a model of 9x9 boards learns the rules, with heads biased toward lines and without.

Both arms see the same boards. The probe replaces some cells of valid boards, in digit images not trained on, by noise;
one call of the model fills them in. A single missing cell is determined by the others; guessing is right one time in
nine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast.evaluation import environment
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.tasks.digits import DigitReader
from ipr_fast.tasks.grids import random_grids
from ipr_fast.tasks.sudoku import DigitSudoku, draw_boards
from ipr_fast.training.configs import config_of
from ipr_fast.training.trainer import Trainer, TrainSettings

SIZES: dict[str, Any] = {"width": 96, "depth": 5, "num_heads": 6}
NEVER = 10**6  # steps: never reached, so the learning rate stays constant
SETTINGS = TrainSettings(steps=NEVER, batch_size=64, learning_rate=2e-3, ema_decay=0.998, symbol_weight=0.0)
MISSING = (1, 20)  # cells
TEST_BOARDS = 200


class RandomStart(DigitSudoku):
    """Boards whose models keep their random initialisation."""

    def initialise(self, model: nn.Module) -> None:
        pass


class FillIn:
    """The probe: boards with missing cells, and the share of them that a model fills in right."""

    def __init__(self, task: DigitSudoku, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        grids = random_grids(TEST_BOARDS, task.side, generator)
        patches = task.grid.to_patches(draw_boards(grids, task.test, generator))
        noise = torch.randn(patches.shape, generator=generator, device="cpu")
        order = torch.rand(patches.shape[:2], generator=generator, device="cpu").argsort(1).argsort(1)
        self.digits, self.patches, self.noise, self.order = (
            each.to(device) for each in (grids.flatten(1), patches, noise, order)
        )
        self.reader = DigitReader(task.train)

    @torch.no_grad()
    def accuracy(self, model: PatchTransformer, missing: int) -> float:
        """Return the share of right digits among `missing` missing cells a board."""
        is_missing = self.order < missing
        noisy = torch.where(is_missing[..., None], self.noise, self.patches)
        clean: Tensor = noisy - model.predict(noisy, is_missing.float(), is_missing).velocity
        size = self.reader.size
        return (self.reader.read(clean.unflatten(-1, (size, size))) == self.digits)[is_missing].float().mean().item()


def compare_initialisations(
    boards: int,
    every: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Train both arms on `boards` boards, probe them after every `every` boards; return the shares, ready for JSON."""
    arms: dict[str, list] = {}
    for name, kind in (("line-biased heads", DigitSudoku), ("random heads", RandomStart)):
        task = kind(9)
        config = replace(config_of(task), **SIZES)
        trainer, probe = Trainer(task, replace(SETTINGS, seed=seed), device, config=config), FillIn(task, device)
        arms[name] = rows = []
        while (seen := trainer.step * SETTINGS.batch_size) < boards:
            trainer.train_step()
            seen_now = seen + SETTINGS.batch_size
            if seen // every != seen_now // every or seen_now >= boards:
                assert isinstance(trainer.ema, PatchTransformer)
                shares = [probe.accuracy(trainer.ema, missing) for missing in MISSING]
                rows.append([seen_now, *shares])
                say(f"{name}: {seen_now:,} boards seen, {', '.join(f'{share:.1%}' for share in shares)} filled right")
    return {
        "seed": seed,
        "sizes": SIZES,
        "missing": MISSING,
        "test_boards": TEST_BOARDS,
        "arms": arms,
        "environment": environment.describe(torch.device(device)),
    }
