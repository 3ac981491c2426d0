"""The benchmark's own evaluators (srmbench, Wewer et al. 2025) on a run's stored samples, sample by sample.

`python -m ipr_fast.evaluation.scale.benchmark FOLDER [CLASSIFIER]` counts on how many stored samples their verdict
and ours agree. CLASSIFIER is the folder of the classifier that srmbench downloads: its MNIST reader for Sudoku boards
of 28x28 cells, its network for Counting Polygons. Even Pixels need none.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipr_fast.errors import BrokenExtra, MissingExtra, import_extra
from ipr_fast.evaluation.scale.folder import RunFolder
from ipr_fast.evaluation.scale.summary import kept_samples
from ipr_fast.tasks.catalog import make_task
from ipr_fast.tasks.counting_polygons import CountingPolygons
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.token_sudoku import TokenSudoku

SUDOKU = "digit-sudoku-9x9"
PURPOSE = "the benchmark's evaluators"
Evaluate = Callable[[Tensor], Tensor]  # samples (B, C, H, W) -> whether each is good, (B,) bool


def evaluator(task: str, classifier: str | None = None) -> Evaluate:
    """Return srmbench's verdict on samples of a task, for one's own samples too; classifier: see above.

    Raises ValueError for a task that srmbench does not have, MissingExtra or BrokenExtra where it cannot be imported.
    """
    if task == EvenPixels.name:
        pixels = _module("even_pixels").EvenPixelsEvaluation()
        return _one_by_one(lambda image: bool(pixels.evaluate(image)["is_color_count_even"]))
    if task == SUDOKU:
        kind = _module("mnist_sudoku").MnistSudokuEvaluation
        boards = type("Boards", (kind,), {} if classifier is None else {"classifier_repo": classifier})()
        boards.classifier.eval()  # srmbench leaves dropout as the file has it
        return lambda samples: boards.evaluate(samples)["is_valid_sudoku"]
    if task == CountingPolygons.name:
        kind = import_extra("srmbench.evaluations", "srmbench", "srmbench", PURPOSE).CountingObjectsEvaluation
        ids = {} if classifier is None else {"repo_ids": {"polygons": classifier}}
        objects = type("Objects", (kind,), ids)("polygons", device="cpu")

        def good(image: Tensor) -> bool:
            found = objects.evaluate(image)
            return bool(found["are_vertices_uniform"] == 1 and found["numbers_match_objects"] == 1)

        return _one_by_one(good)
    raise ValueError(f"srmbench judges {EvenPixels.name}, {SUDOKU} and {CountingPolygons.name}, got {task}")


def agreement(run: RunFolder, evaluate: Evaluate) -> dict[str, dict[str, int]]:
    """Compare srmbench's verdict with the stored one on an arm's first and last stored samples, for each arm.

    Returns for each arm the numbers of `samples`, of those that `both` call good, and that only `ours` or `theirs` do.
    """
    task = make_task(run.plan.task, run.plan.mnist)
    if isinstance(task, TokenSudoku):
        raise ValueError(f"srmbench judges images, got a run of {task.name}")
    found = {}
    for arm in run.plan.arms:
        counts = dict.fromkeys(("samples", "both", "ours", "theirs"), 0)
        for _, stored, good in kept_samples(run, arm.name):
            for iteration in {0, arm.iterations}:
                images = np.stack([np.frombuffer(each, np.float32) for each in stored[iteration]])
                theirs = evaluate(torch.from_numpy(images).unflatten(1, task.grid.sample_shape)).cpu()
                ours = torch.from_numpy(good[iteration].copy())
                verdicts = {"samples": ours | ~ours, "both": ours & theirs}
                verdicts |= {"ours": ours & ~theirs, "theirs": theirs & ~ours}
                for name, each in verdicts.items():
                    counts[name] += int(each.sum())
        found[arm.name] = counts
    return found


def _one_by_one(good: Callable[[Tensor], bool]) -> Evaluate:
    """srmbench returns the means of a batch; of one sample, the mean is its own."""

    def evaluate(samples: Tensor) -> Tensor:
        return torch.tensor([good(sample[None]) for sample in samples], dtype=torch.bool, device="cpu")

    return evaluate


@cache
def _module(name: str) -> ModuleType:
    """Import one of srmbench's modules of evaluations alone: the package imports data sets and torchvision."""
    package = importlib.util.find_spec("srmbench")
    if package is None or not package.submodule_search_locations:
        raise MissingExtra("srmbench", "srmbench", PURPOSE)
    path = Path(package.submodule_search_locations[0]) / "evaluations" / f"{name}_evaluation.py"
    spec = importlib.util.spec_from_file_location(f"ipr_fast_srmbench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BrokenExtra("srmbench", PURPOSE, error) from error
    return module


def main(folder: str, classifier: str | None = None) -> dict[str, Any]:
    """Print the agreement of a run's arms, and return it."""
    run = RunFolder.at(Path(folder))
    found = agreement(run, evaluator(run.plan.task, classifier))
    for arm, counts in found.items():
        same = counts["samples"] - counts["ours"] - counts["theirs"]
        print(
            f"{arm}: {same} of {counts['samples']} verdicts agree; good: {counts['both']} by both, "
            f"{counts['ours']} by our judge alone, {counts['theirs']} by srmbench alone"
        )
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
