"""Finding the objects of an image."""

import pytest
import torch

from ipr_fast.tasks.polygons.backgrounds import paintings
from ipr_fast.tasks.polygons.drawing import SIDE, compose, coverage, draw_scenes
from ipr_fast.tasks.polygons.objects import (
    CROP,
    MOST,
    SMALLEST_AREA,
    connected_areas,
    cover,
    find_objects,
    object_colour,
)


def drawn(count, seed):
    generator = torch.Generator().manual_seed(seed)
    polygons = torch.randint(1, 10, (count,), generator=generator)
    scene = draw_scenes(polygons, torch.randint(3, 8, (count, 9), generator=generator), generator)
    covered = coverage(scene)
    return compose(covered, paintings(SIDE, count, generator)), covered, scene


@pytest.mark.parametrize("density", [0.0, 0.2, 0.4, 0.5, 0.7, 1.0])
def test_areas_are_those_of_scipy(density):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = torch.rand(3, 40, 33, generator=torch.Generator().manual_seed(0)) < density
    labels = connected_areas(mask)
    assert torch.equal(labels > 0, mask)
    for ours, each in zip(labels, mask, strict=True):
        theirs, count = ndimage.label(each.numpy(), structure=[[1] * 3] * 3)
        pairs = torch.stack([ours.flatten(), torch.from_numpy(theirs).flatten()]).T.unique(dim=0)
        assert len(pairs) == len(ours.unique()) == count + int(not each.all())


def test_a_spiral_is_one_area():
    mask = torch.zeros(1, 31, 31, dtype=torch.bool)
    row = column = 15
    mask[0, row, column] = True
    for length in range(1, 15):
        for step in ((0, 1), (1, 0)) if length % 2 else ((0, -1), (-1, 0)):
            for _ in range(2 * length):
                row, column = row + step[0], column + step[1]
                if 0 <= row < 31 and 0 <= column < 31:
                    mask[0, row, column] = True
    assert len(connected_areas(mask)[mask].unique()) == 1


def test_the_colour_and_the_cover_are_found():
    images, covered, scene = drawn(60, 0)
    unit = (images + 1) / 2
    x, y = scene.centres[:, 2].long().unbind(1)
    true = unit[torch.arange(60), :, y, x]
    assert (object_colour(unit) - true).abs().max() < 0.03
    error = (cover(unit) - covered).abs()
    assert error.mean() < 0.03
    assert error[covered == 1].max() < 0.2


def test_crops_show_the_objects_alone():
    images, _, scene = drawn(40, 1)
    found = find_objects(images)
    assert found.crops.shape == (40, MOST, CROP, CROP)
    apart = torch.cdist(found.middles, scene.centres[:, 2:])
    for i in range(40):
        for k in range(int((scene.vertices[i] > 0).sum())):
            nearest = apart[i, :, k].argmin()
            assert apart[i, nearest, k] < 0.35 * scene.radii[i, 2 + k] + 1  # a triangle's box is off its centre
            vertices, radius = scene.vertices[i, k], scene.radii[i, 2 + k]
            area = vertices / 2 * radius**2 * (2 * torch.pi / vertices).sin()
            seen = found.crops[i, nearest].sum() * (found.sides[i, nearest] / CROP) ** 2
            assert seen.item() == pytest.approx(area.item(), rel=0.12)
            assert found.crops[i, nearest][0].max() < 0.05


def test_specks_are_ignored_and_only_so_many_objects_kept():
    image = torch.full((1, 3, SIDE, SIDE), -0.2)
    red = torch.tensor([0.8, -1.0, -1.0])[:, None, None]
    for i in range(30):  # thirty squares of 3 to 8 pixels a side, and specks of 2
        size, row, column = 3 + i // 5, 20 * (i // 6) + 3, 20 * (i % 6) + 3
        image[0, :, row : row + size, column : column + size] = red
        image[0, :, row + 12 : row + 14, column : column + 2] = red
    found = find_objects(image)
    assert found.there.sum() == MOST
    sides = (found.sides[0] - 2) / 1.2
    assert sides.round().tolist() == sorted([3 + i // 5 for i in range(30)], reverse=True)[:MOST]
    assert SMALLEST_AREA > 4


def test_the_largest_possible_object_is_found_too():
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[0] = torch.tensor([0.8, -1.0, -1.0])[:, None, None]
    assert find_objects(image).there.sum() <= 1
