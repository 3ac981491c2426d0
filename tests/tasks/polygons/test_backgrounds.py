"""Backgrounds: paintings and the pictures of a folder."""

import re

import numpy as np
import pytest
import torch

from ipr_fast.tasks.counting_polygons import CountingPolygons
from ipr_fast.tasks.hues import to_hsv
from ipr_fast.tasks.polygons.backgrounds import backgrounds_from, grey, load_pictures, paintings
from ipr_fast.tasks.polygons.drawing import rarest_hue


@pytest.fixture
def folder(tmp_path):
    """Four pictures of one colour each, of several sizes, one in a folder of its own, beside another file."""
    image_of = pytest.importorskip("PIL.Image")
    (tmp_path / "more").mkdir()
    for name, size, shade in (("b.png", (40, 70), 50), ("a.jpg", (300, 200), 100), ("more/c.PNG", (16, 16), 150)):
        image_of.fromarray(np.full((*size[::-1], 3), shade, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_paintings_follow_the_generator_and_differ():
    first, again, other = (paintings(64, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape == (4, 3, 64, 64)
    assert first.min() >= 0
    assert first.max() <= 1
    assert (first - other).abs().mean() > 0.05
    assert (first[0] - first[1]).abs().mean() > 0.05


def test_paintings_leave_hues_free():
    """A quarter of a turn without a hue, among pixels that are not grey, in nearly all of 100 paintings."""
    hue, saturation, _ = to_hsv(paintings(64, 100, torch.Generator().manual_seed(2)))
    empty = 0
    for hues, strong in zip(hue.flatten(1), saturation.flatten(1) > 0.3, strict=True):
        counts = (hues[strong] * 16).long().clamp(max=15).bincount(minlength=16)
        quarter = sum(counts.roll(-k) for k in range(4))
        empty += int(quarter.min() <= 0.01 * counts.sum())
    assert empty >= 90


def test_the_rarest_hue_beside_grey_is_cyan():
    images = grey(8, 2, torch.Generator().manual_seed(0))
    assert torch.equal(images, torch.full((2, 3, 8, 8), 0.5))
    assert rarest_hue(images).tolist() == pytest.approx([0.5, 0.5], abs=1 / 255)


def test_pictures_are_cut_to_the_size_in_order_of_their_paths(folder):
    pictures = load_pictures(folder, 32)
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    assert [round(picture.float().mean().item()) for picture in pictures] == [100, 50, 150]


def test_a_tasks_images_are_over_the_pictures(folder):
    task = CountingPolygons(str(folder))
    images = task.sample(20, torch.Generator().manual_seed(0))
    shades = {round(255 * (image[0, 0, 0].item() + 1) / 2) for image in images}
    assert shades == {50, 100, 150}
    assert task.judge()(images).good.float().mean() > 0.9


def test_a_folder_without_pictures_is_refused(tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="backgrounds: no picture"):
        backgrounds_from(tmp_path, 32)
    with pytest.raises(ValueError, match=r"backgrounds must be a folder of pictures or 'plain': .*absent is no folder"):
        backgrounds_from(tmp_path / "absent", 32)
    with pytest.raises(ValueError, match="backgrounds must be the path of a folder, got ''"):
        CountingPolygons("")


def test_a_file_that_is_no_picture_is_named(folder):
    (folder / "d.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=f"^backgrounds: {re.escape(str(folder / 'd.png'))} cannot be read"):
        load_pictures(folder, 32)
