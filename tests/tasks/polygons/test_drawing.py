"""How scenes of polygons and digits are laid out and drawn."""

import colorsys
import math

import pytest
import torch

from ipr_fast.tasks.polygons.backgrounds import paintings
from ipr_fast.tasks.polygons.drawing import (
    LARGEST,
    SIDE,
    SMALLEST,
    SMALLEST_OF_DIGITS,
    WINDOW,
    compose,
    coverage,
    draw_polygons,
    draw_scenes,
    rarest_hue,
)
from ipr_fast.tasks.polygons.glyphs import HEIGHT, STROKE, STROKES, WIDTH, distance_tables, draw_digits
from ipr_fast.tasks.polygons.layout import GAP, SHRUNK, place_circles


def scenes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    polygons = torch.randint(1, 10, (count,), generator=generator)
    vertices = torch.randint(3, 8, (count, 9), generator=generator)
    return draw_scenes(polygons, vertices, generator), polygons, vertices


def test_circles_keep_apart_and_inside():
    scene, polygons, _ = scenes(500)
    there = scene.radii > 0
    assert torch.equal(there.sum(1), polygons + 2)
    reach = scene.radii[..., None] + GAP * SIDE - 1e-3
    outside = (scene.centres < reach) | (scene.centres > SIDE - reach)
    assert not (outside.any(-1) & there).any()
    apart = torch.cdist(scene.centres, scene.centres) - scene.radii[:, None] - scene.radii[:, :, None]
    pairs = there[:, None] & there[:, :, None] & ~torch.eye(11, dtype=torch.bool)
    assert apart[pairs].min() > GAP * SIDE - 1e-3


def test_few_circles_shrink_below_their_law():
    """One in 2,000 polygons does. Of 3,000, more than ten have probability below 1e-5."""
    scene, *_ = scenes(600, seed=1)
    radii = scene.radii / SIDE
    assert (radii[:, 2:][scene.vertices > 0] < SMALLEST - 1e-6).sum() <= 10
    assert (radii[:, :2] < SMALLEST_OF_DIGITS - 1e-6).sum() <= 10
    assert radii.max() <= LARGEST + 1e-6
    assert radii[radii > 0].min() > SMALLEST * SHRUNK


def test_a_circle_without_room_shrinks_and_one_without_any_is_left_out():
    radii = torch.tensor([[0.3, 0.3, 0.0], [0.4, 0.4, 0.0]])
    centres, placed = place_circles(radii, torch.Generator().manual_seed(0))
    (left_out, shrunk, whole), (_, none, large) = placed.sort(1).values.tolist()
    assert whole == pytest.approx(0.3)
    assert 0.3 * SHRUNK - 1e-6 <= shrunk < 0.3
    assert torch.cdist(centres, centres)[0, 0, 1] >= whole + shrunk + GAP - 1e-6
    assert (left_out, none) == (0, 0)
    assert large == pytest.approx(0.4)


@pytest.mark.parametrize("vertices", [3, 4, 5, 6, 7])
def test_a_polygon_covers_its_area(vertices):
    """A pixel is half a pixel off at most, and that along the sides evens out; corners round by less than a pixel."""
    radii = torch.tensor([[10.0, 14.5, 25.0]])
    angles, centres = torch.tensor([[0.0, 0.4, 1.1]]), torch.tensor([[[28.0, 28.3], [27.6, 28.5], [28.1, 27.9]]])
    windows = draw_polygons(torch.full((1, 3), vertices), centres, radii, angles)
    assert windows.shape == (1, 3, WINDOW, WINDOW)
    area = vertices / 2 * radii**2 * math.sin(2 * math.pi / vertices)
    assert (windows.sum((2, 3)) - area).abs().max() < 0.25 * vertices
    assert windows[0, :, 0].max() == windows[0, :, :, 0].max() == 0  # nothing reaches the window's edge


def test_a_polygons_vertices_lie_on_its_circle():
    windows = draw_polygons(
        torch.tensor([[5]]), torch.tensor([[[28.0, 28.0]]]), torch.tensor([[20.0]]), torch.tensor([[0.3]])
    )
    for i in range(10):
        angle = 0.3 + i * math.pi / 5
        reach = 20 if i % 2 == 0 else 20 * math.cos(math.pi / 5)  # a vertex, the middle of a side
        for distance, covered in ((reach - 3, 1), (reach + 1.5, 0)):
            x, y = (int(28 + distance * f(angle)) for f in (math.cos, math.sin))
            assert windows[0, 0, y, x] == covered


def test_a_polygon_of_no_vertices_is_absent():
    nothing = draw_polygons(torch.zeros(1, 1).long(), torch.full((1, 1, 2), 28.0), torch.ones(1, 1), torch.ones(1, 1))
    assert nothing.sum() == 0


def test_coverage_has_every_object():
    scene, polygons, vertices = scenes(30, seed=2)
    covered = coverage(scene)
    area = (vertices / 2 * scene.radii[:, 2:] ** 2 * (2 * math.pi / vertices).sin()).sum(1)
    em = scene.radii[:, :2]
    digits = sum(
        draw_digits(scene.numbers[:, i], torch.full((30, 2), 10.0), em[:, i], WINDOW).sum((1, 2)) for i in (0, 1)
    )
    assert (covered.sum((1, 2)) - area - digits).abs().max() < 0.25 * 7 * polygons.max()


def test_digits_differ_and_lie_in_their_box():
    tables = distance_tables(torch.device("cpu"))
    assert tables.shape[0] == len(STROKES) == 9
    drawn = draw_digits(torch.arange(1, 10), torch.full((9, 2), 4.0), torch.full((9,), 40.0), WINDOW)
    assert drawn[:, :3].max() == drawn[:, :, :3].max() == 0
    assert drawn[:, 5 + round(40 * HEIGHT) :].max() == drawn[:, :, 5 + round(40 * WIDTH) :].max() == 0
    difference = (drawn[:, None] - drawn[None]).abs().sum((2, 3))
    assert difference[~torch.eye(9, dtype=torch.bool)].min() > 0.2 * drawn.sum((1, 2)).min()


def test_a_stroke_has_its_thickness():
    """The long stroke of a 1, 24 em-parts high: its cover per row is its thickness in pixels."""
    em = 40.0
    drawn = draw_digits(torch.tensor([1]), torch.full((1, 2), 4.0), torch.tensor([em]), WINDOW)[0]
    row = drawn[4 + round(0.5 * em)]
    assert row.sum().item() == pytest.approx(2 * STROKE * em, abs=0.1)


def test_objects_have_the_hue_that_the_background_has_least():
    backgrounds = paintings(SIDE, 6, torch.Generator().manual_seed(3))
    hues = rarest_hue(backgrounds)
    images = compose(torch.ones(6, SIDE, SIDE), backgrounds)
    for background, hue, image in zip(backgrounds, hues.tolist(), images, strict=True):
        counts = [0] * 256
        for red, green, blue in background.flatten(1)[:, ::16].T.double().tolist():
            counts[int(colorsys.rgb_to_hsv(red, green, blue)[0] * 255)] += 1
        blurred = [
            sum(counts[(h + k) % 256] * math.exp(-(k**2) / (2 * 26**2)) for k in range(-127, 128)) for h in range(256)
        ]
        # a sixteenth of the pixels: nearly the rarest
        assert blurred[round(255 * hue)] <= min(blurred) + 0.02 * max(blurred)
        wanted = [int(255 * c) / 255 for c in colorsys.hsv_to_rgb(hue, 1.0, 0.9)]
        assert ((image[:, 0, 0] + 1) / 2).tolist() == pytest.approx(wanted, abs=1.01 / 255)


def test_the_hue_is_the_benchmarks():
    """Grey has hue 0; bins 0..255 of 255 a turn, as pillow's HSV has; a blur of 26 bins around the circle."""
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert 255 * rarest_hue(grey).item() == pytest.approx(128, abs=1.01)
    red_and_cyan = torch.stack([torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])], dim=1)[None, :, None]
    hue = 255 * rarest_hue(red_and_cyan).item()
    assert min(abs(hue - 63.5), abs(hue - 191.5)) < 1.5
