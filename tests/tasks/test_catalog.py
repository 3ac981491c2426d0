import re
import struct

import numpy as np
import pytest

from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.catalog import TASKS, make_task, task_of
from ipr_fast.tasks.counting_polygons import CountingPolygons
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku

IMAGE_TASKS = (
    "digit-sudoku-4x4",
    "digit-sudoku-9x9",
    "even-pixels",
    "counting-polygons",
    "counting-polygons-small",
)


@pytest.fixture
def mnist(tmp_path):
    """A folder of files in MNIST's format, of ten images each."""
    for stem in ("train", "t10k"):
        images = struct.pack(">4I", 0x0803, 10, 28, 28) + bytes(10 * 28 * 28)
        labels = struct.pack(">2I", 0x0801, 10) + np.arange(10, dtype=np.uint8).tobytes()
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return str(tmp_path)


def test_the_names_of_the_tasks():
    assert (*IMAGE_TASKS, "token-sudoku-4x4", "token-sudoku-9x9") == TASKS


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_a_task_is_made_by_name_and_found_again_by_its_samples(name):
    task = make_task(name)
    assert task.name == name
    found = task_of(task.grid)
    assert type(found) is type(task)
    assert found.name == name
    assert found.grid == task.grid


def test_tasks_are_what_their_names_say():
    assert [make_task(name).side for name in TASKS[:2]] == [4, 9]
    assert isinstance(make_task("digit-sudoku-9x9"), DigitSudoku)
    assert isinstance(make_task("even-pixels"), EvenPixels)
    assert [(make_task(name).noun, make_task(name).adjective) for name in TASKS] == [
        ("board", "valid"),
        ("board", "valid"),
        ("image", "balanced"),
        ("image", "consistent"),
        ("image", "consistent"),
        ("board", "valid"),
        ("board", "valid"),
    ]


@pytest.mark.parametrize("side", [4, 9])
def test_boards_of_mnists_digits_are_another_task(mnist, side):
    task = make_task(f"digit-sudoku-{side}x{side}", mnist)
    assert task.name == f"digit-sudoku-{side}x{side}-mnist"
    assert task.grid == PatchGrid(1, 28 * side, 28 * side, 28)
    assert task_of(task.grid, mnist).grid == task.grid


@pytest.mark.parametrize("name", ["digit-sudoku-16x16", "Even-Pixels", "", None])
def test_other_names_are_refused(name):
    said = f"task must be one of {TASKS}, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        make_task(name)


def test_even_pixels_take_no_digits(mnist):
    with pytest.raises(ValueError, match="mnist: even-pixels has no digit images"):
        make_task("even-pixels", mnist)
    with pytest.raises(ValueError, match="mnist: even-pixels has no digit images"):
        task_of(EvenPixels().grid, mnist)
    with pytest.raises(ValueError, match="mnist: counting-polygons has no digit images"):
        task_of(CountingPolygons().grid, mnist)


def test_backgrounds_are_of_polygons_alone(tmp_path):
    with pytest.raises(ValueError, match="backgrounds: even-pixels has none"):
        make_task("even-pixels", backgrounds=str(tmp_path))
    with pytest.raises(ValueError, match="backgrounds: counting-polygons-small has none"):
        make_task("counting-polygons-small", backgrounds=str(tmp_path))
    with pytest.raises(ValueError, match="backgrounds: no picture"):
        make_task("counting-polygons", backgrounds=str(tmp_path))


@pytest.mark.parametrize(
    "grid",
    [
        PatchGrid(1, 40, 40, 8),
        PatchGrid(1, 32, 72, 8),
        PatchGrid(2, 32, 32, 8),
        PatchGrid.of((1, 32), 8),
        PatchGrid.of((3, 4, 32, 32), 4),
    ],
)
def test_samples_of_no_task_are_refused(grid):
    said = f"model: no task has samples {grid.sample_shape}; the tasks are digit-sudoku-4x4, "
    with pytest.raises(ValueError, match=re.escape(said)):
        task_of(grid)


def test_boards_of_other_cells_are_refused_with_a_hint():
    said = (
        "model: it makes samples (1, 252, 252) of 81 patches, but digit-sudoku-9x9 has (1, 72, 72) of 81 "
        "(digits of 28x28 pixels: see --mnist)"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        task_of(PatchGrid(1, 252, 252, 28))


def test_images_of_polygons_in_other_patches_are_refused():
    said = "model: it makes samples (3, 128, 128) of 1024 patches, but counting-polygons has (3, 128, 128) of 256"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        task_of(PatchGrid(3, 128, 128, 4))


@pytest.mark.parametrize("grid", [PatchGrid(3, 48, 48, 4), PatchGrid(3, 32, 32, 8), PatchGrid(3, 32, 64, 4)])
def test_other_coloured_images_are_refused_without_one(grid):
    said = (
        f"model: it makes samples {grid.sample_shape} of {grid.num_patches} patches, but even-pixels has "
        "(3, 32, 32) of 64"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        task_of(grid)
