"""The cells of a table of arms by budget, and the file that keeps them until the table is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks, outputs
from ipr_fast.evaluation import environment
from ipr_fast.evaluation.experiments import compare

RECORD = "a measurement that can be gone on with"


class Outcome(NamedTuple):
    """The violations (B,) int64 of an arm's boards, on the CPU; a board without any is good."""

    violations: Tensor

    @property
    def good(self) -> Tensor:
        return self.violations == 0

    def measures(self) -> dict[str, Tensor]:
        return {"violations": self.violations}


class Cell(NamedTuple):
    """An arm's outcome at a budget, its mean calls a board, and the commit that it was measured at."""

    outcome: Outcome
    calls: float
    reward_calls: float
    commit: str


class Cells:
    """Cells by arm and budget. folder: keeps them, with the settings that decide them; None keeps none.

    A folder's cells need not be measured again. Raises ValueError for one of other settings, naming what differs, and
    for one whose file cannot be read.
    """

    def __init__(self, settings: dict[str, Any], folder: Path | None = None) -> None:
        self.settings = json.loads(json.dumps(settings))  # tuples become lists
        self.path = None if folder is None else folder / "cells.json"
        self.found: dict[str, dict[int, Cell]] = {}
        self._commit = environment.current_commit()
        if folder is not None:
            outputs.prepare_folder(folder)
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        kept = outputs.read_json(path, RECORD)
        try:
            settings = dict(kept["settings"])
            for row in kept["cells"]:
                outcome = Outcome(torch.tensor(row["violations"], dtype=torch.int64, device="cpu"))
                if outcome.violations.shape != (settings["count"],):
                    raise ValueError(f"violations must be {settings['count']} numbers")
                cell = Cell(outcome, float(row["calls"]), float(row["reward_calls"]), str(row["commit"]))
                self.found.setdefault(row["arm"], {})[checks.integer("budget", row["budget"], 1)] = cell
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not {RECORD} ({error!r})") from error
        checks.same_settings(path, settings, self.settings)

    def holds(self, arm: str, budget: int) -> bool:
        return budget in self.found.get(arm, {})

    def add(self, arm: str, budget: int, violations: Tensor, calls: float, reward_calls: float) -> None:
        cell = Cell(Outcome(violations.cpu()), float(calls), float(reward_calls), self._commit)
        self.found.setdefault(arm, {})[budget] = cell

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        cells = [
            {
                "arm": arm,
                "budget": budget,
                "calls": cell.calls,
                "reward_calls": cell.reward_calls,
                "commit": cell.commit,
                "violations": cell.outcome.violations.tolist(),
            }
            for arm, row in self.found.items()
            for budget, cell in row.items()
        ]
        outputs.write_json(self.path, {"settings": self.settings, "cells": cells})

    @property
    def commits(self) -> str:
        """The commits that cells were measured at."""
        return ", ".join(dict.fromkeys(cell.commit for row in self.found.values() for cell in row.values()))

    def rows(self, rival: str) -> list[dict[str, Any]]:
        """Return the rows, ready for JSON: each cell compared with the arm `rival` at its budget."""
        rivals = self.found[rival]
        return [
            {
                "name": arm,
                "cells": [
                    {
                        "budget": at,
                        "calls": cell.calls,
                        "reward_calls": cell.reward_calls,
                        **compare(rivals[at].outcome, cell.outcome),
                    }
                    for at, cell in sorted(cells.items())
                ],
            }
            for arm, cells in self.found.items()
        ]
