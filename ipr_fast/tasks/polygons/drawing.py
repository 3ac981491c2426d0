"""Scenes of polygons and digits, and their images.

As the benchmark draws them: polygons are regular, of any angle, inscribed in their circles; a digit's em is its
circle's radius and its upper left corner lies near the circle's middle; all objects have one colour, of the hue that
the background has least, saturation 1 and value 0.9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.tasks.hues import of_hue, to_hsv
from ipr_fast.tasks.polygons.glyphs import HEIGHT, STROKE, WIDTH, draw_digits
from ipr_fast.tasks.polygons.layout import place_circles

SIDE = 128  # pixels
MOST_POLYGONS, FEWEST_VERTICES, MOST_VERTICES = 9, 3, 7
SMALLEST, SMALLEST_OF_DIGITS = 0.075, 0.1  # radii of polygons and digits, in image sides: 9.6 and 12.8 pixels
LARGEST, CROWDED = 0.2, 0.345  # the largest radius is the smaller of LARGEST and CROWDED / sqrt(number of circles)
SATURATION, VALUE = 1.0, 0.9
BINS, BLUR = 256, 26.0  # of the histogram of the background's hues, and the deviation of its Gaussian blur in bins
WINDOW = 56  # pixels a side of the square in which an object is drawn; at least 2 * LARGEST * SIDE + 2
CORNER = (0.045, 0.21)  # upper left corner of a digit beyond its circle's middle, in em


class Scene(NamedTuple):
    """What B images with at most K polygons show; lengths are in pixels.

    numbers   (B, 2) int64: the digits that are drawn
    vertices  (B, K) int64: of each polygon, 0 where there is none
    centres   (B, 2 + K, 2), radii (B, 2 + K): circles of the two digits and of the polygons
    angles    (B, K): of the polygons, in radians
    """

    numbers: Tensor
    vertices: Tensor
    centres: Tensor
    radii: Tensor
    angles: Tensor

    @property
    def polygons(self) -> Tensor:
        """(B,) int64: the number of polygons."""
        return (self.vertices > 0).sum(1)


def draw_scenes(polygons: Tensor, vertices: Tensor, generator: torch.Generator) -> Scene:
    """Draw where B images have their objects.

    polygons (B,) int64 in 1..K; vertices (B, K) int64 in 3..7, of which the first `polygons` count. The digits say the
    number of polygons and the first one's vertices.
    """
    device, (batch, count) = generator.device, vertices.shape
    there = torch.arange(count, device=device) < polygons[:, None]
    most = (CROWDED / (polygons + 2).sqrt()).clamp(max=LARGEST)[:, None]
    least = torch.full((2 + count,), SMALLEST, device=device)
    least[:2].fill_(SMALLEST_OF_DIGITS)
    radii = least + (most - least) * torch.rand(batch, len(least), generator=generator, device=device)
    radii[:, 2:] *= there
    centres, radii = place_circles(radii, generator)
    angles = 2 * math.pi * torch.rand(batch, count, generator=generator, device=device)
    numbers = torch.stack([polygons, vertices[:, 0]], dim=1)
    return Scene(numbers, vertices * there, SIDE * centres, SIDE * radii, angles)


def draw_scenes_in_cells(
    polygons: Tensor, vertices: Tensor, generator: torch.Generator, cells: int, radius: float, em: float
) -> Scene:
    """Draw scenes of `draw_scenes` whose objects have one size and lie in the middles of different cells.

    cells: cells a side, each of 2 * radius + 4 pixels; cells**2 >= 2 + K. radius: of polygons. em: of digits.
    """
    device, (batch, count) = generator.device, vertices.shape
    there = torch.arange(count, device=device) < polygons[:, None]
    cell = torch.rand(batch, cells**2, generator=generator, device=device).argsort(1)[:, : 2 + count]
    centres = (2 * radius + 4) * (torch.stack([cell % cells, cell // cells], dim=-1) + 0.5)
    for axis, size in enumerate((WIDTH, HEIGHT)):
        centres[:, :2, axis] -= em * (CORNER[axis] + size / 2)
    radii = torch.full((batch, 2 + count), radius, device=device)
    radii[:, :2].fill_(em)
    radii[:, 2:] *= there
    angles = 2 * math.pi * torch.rand(batch, count, generator=generator, device=device)
    return Scene(torch.stack([polygons, vertices[:, 0]], dim=1), vertices * there, centres, radii, angles)


def object_circles(scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the middles (B, 2 + K, 2) and radii (B, 2 + K) of circles about the digits and polygons of scenes."""
    middles, radii = scene.centres.clone(), scene.radii.clone()
    for axis, size in enumerate((WIDTH, HEIGHT)):
        middles[:, :2, axis] += scene.radii[:, :2] * (CORNER[axis] + size / 2)
    radii[:, :2] *= HEIGHT / 2 * 1.2
    return middles, radii


def coverage(scene: Scene, stroke: float | Tensor = STROKE) -> Tensor:
    """Return how much of each pixel the objects cover: (B, 128, 128) in [0, 1].

    stroke: half the thickness of the digits' strokes in em, a number or (B, 1, 1).
    """
    canvas = torch.zeros(len(scene.numbers), SIDE, SIDE, device=scene.numbers.device)
    em = scene.radii[:, :2]
    corners = scene.centres[:, :2] + torch.stack([em * CORNER[0], em * CORNER[1]], -1)
    first = _first_pixels(corners + em[..., None] / 2)
    if isinstance(stroke, Tensor):
        stroke = stroke.repeat_interleave(2, 0)
    digits = draw_digits(
        scene.numbers.flatten(), (corners - first).flatten(0, 1), em.flatten(), WINDOW, stroke
    ).unflatten(0, em.shape)
    _paste(canvas, digits, first)
    first = _first_pixels(scene.centres[:, 2:])
    _paste(canvas, draw_polygons(scene.vertices, scene.centres[:, 2:] - first, scene.radii[:, 2:], scene.angles), first)
    return canvas


def draw_polygons(vertices: Tensor, centres: Tensor, radii: Tensor, angles: Tensor) -> Tensor:
    """Draw regular polygons: how much of each pixel of a window of one's own they cover, (B, K, WINDOW, WINDOW).

    vertices (B, K) int64, 0 for none; centres (B, K, 2) as (x, y) and radii (B, K) in pixels of the window; angles
    (B, K) of a vertex.
    """
    pixel = torch.arange(WINDOW, device=radii.device) + 0.5
    x, y = ((pixel - centres[..., i, None]) for i in (0, 1))
    sector = 2 * math.pi / vertices.clamp(min=FEWEST_VERTICES)
    beyond = torch.full((*radii.shape, WINDOW, WINDOW), -math.inf, device=radii.device)  # the farthest side
    for side in range(MOST_VERTICES):  # those with fewer repeat some
        normal = (angles + (side + 0.5) * sector)[..., None]
        across = (normal.cos() * x)[..., None, :] + (normal.sin() * y)[..., :, None]
        beyond = torch.maximum(beyond, across)
    inner = radii * (sector / 2).cos()  # distance of the sides from the centre
    return (0.5 + inner[..., None, None] - beyond).clamp_(0, 1) * (vertices > 0)[..., None, None]


def _first_pixels(middles: Tensor) -> Tensor:
    """Return the first pixel (x, y) of windows that are inside the image, about these middles (B, K, 2): int64."""
    return (middles - WINDOW / 2).round().long().clamp(0, SIDE - WINDOW)


def _paste(canvas: Tensor, windows: Tensor, first: Tensor) -> None:
    """Take the larger of the pixels of a canvas (B, SIDE, SIDE) and of windows (B, K, WINDOW, WINDOW)."""
    pixel = torch.arange(WINDOW, device=canvas.device)
    rows, columns = first[..., 1, None] + pixel, first[..., 0, None] + pixel
    places = (rows[..., :, None] * SIDE + columns[..., None, :]).flatten(1)
    canvas.flatten(1).scatter_reduce_(1, places, windows.flatten(1), "amax")


def rarest_hue(images: Tensor) -> Tensor:
    """Return the hue in 0..255 / 255 that images (B, 3, H, W) in [0, 1] have least: (B,), as the benchmark finds it.

    The hues of all pixels are counted in 256 bins and blurred around the circle; grey has hue 0.
    """
    hue = to_hsv(images)[0].flatten(1)
    bins = (hue * (BINS - 1)).long()
    counts = torch.zeros(len(hue), BINS, device=hue.device).scatter_add_(1, bins, torch.ones_like(hue))
    offset = torch.arange(BINS - 1, device=hue.device) - (BINS - 1) // 2
    kernel = torch.exp(-(offset**2) / (2 * BLUR**2))
    edge = (BINS - 1) // 2
    blurred = F.conv1d(F.pad(counts[:, None], (edge, edge), mode="circular"), (kernel / kernel.sum())[None, None])
    return blurred[:, 0].argmin(1) / (BINS - 1)


def compose(covered: Tensor, backgrounds: Tensor) -> Tensor:
    """Paint objects over backgrounds (B, 3, H, W) in [0, 1], in the hue that these have least: images in [-1, 1]."""
    colour = (255 * of_hue(rarest_hue(backgrounds), SATURATION, VALUE)).floor() / 255
    images = torch.lerp(backgrounds, colour[:, :, None, None], covered[:, None])
    return 2 * images - 1
