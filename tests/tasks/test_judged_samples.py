"""What tasks and their judges refuse, by the argument's name."""

import numpy as np
import pytest
import torch

from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.tasks.counting_polygons import CountingPolygons
from ipr_fast.tasks.sudoku import DigitSudoku


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("counting-polygons", (2, 1, 128, 128), r"PolygonsJudge: .*\(B, 3, H, W\) with H and W >= 56"),
        ("counting-polygons", (3, 128, 128), r"PolygonsJudge: .*\(B, 3, H, W\) with H and W >= 56"),
        ("counting-polygons", (2, 3, 4, 4), r"PolygonsJudge: .*\(B, 3, H, W\) with H and W >= 56"),
        ("even-pixels", (2, 1, 32, 32), r"HueJudge: .*\(B, 3, H, W\)"),
        ("even-pixels", (3, 32, 32), r"HueJudge: .*\(B, 3, H, W\)"),
        ("even-pixels", (2, 3, 0, 32), r"HueJudge: .*\(B, 3, H, W\)"),
        ("digit-sudoku-4x4", (2, 1, 16, 16), r"BoardJudge: .*\(B, 1, 32, 32\)"),
        ("digit-sudoku-4x4", (1, 32, 32), r"BoardJudge: .*\(B, 1, 32, 32\)"),
        ("token-sudoku-4x4", (2, 4, 4), r"GridJudge: .*\(B, 16\)"),
    ],
)
def test_judges_name_the_shape_that_came_and_the_one_expected(name, shape, expected):
    judge = make_task(name).judge()
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"{expected}, got shape \({got}\)"):
        judge(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"{expected}, got ndarray"):
        judge(np.zeros(shape))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", [-1, 2.0, True])
def test_a_number_of_samples_is_an_integer(name, count):
    with pytest.raises(ValueError, match=f"batch_size must be an int >= 0, got {count}"):
        make_task(name).sample(count, seeded())


def test_folders_are_paths():
    for argument in ("backgrounds", "classifier"):
        with pytest.raises(ValueError, match=f"{argument} must be the path of a folder, got 5"):
            CountingPolygons(**{argument: 5})
    with pytest.raises(ValueError, match="mnist must be the path of a folder, got 5"):
        DigitSudoku(4, 5)
