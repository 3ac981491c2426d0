"""The digits 1 to 9 as strokes, and tables of distances to them, from which digits of any size are drawn smoothly."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

# A digit is 0.72 em high and about 0.44 em wide; (0, 0) is its upper left corner and y points down, in em.
HEIGHT, WIDTH = 0.72, 0.44
STROKE = 0.042  # half the thickness of a stroke
EDGE = 0.12  # of a table beyond the digit, on each side
CELLS = 96  # of a table an em

Points = list[tuple[float, float]]


def _arc(x: float, y: float, wide: float, high: float, first: float, last: float) -> Points:
    """Points on an ellipse from one angle to another, in degrees, clockwise from the right."""
    steps = max(2, round(abs(last - first) / 15))
    angles = [math.radians(first + (last - first) * i / steps) for i in range(steps + 1)]
    return [(x + wide * math.cos(a), y + high * math.sin(a)) for a in angles]


def _turned(strokes: list[Points]) -> list[Points]:
    return [[(WIDTH - x, HEIGHT - y) for x, y in line] for line in strokes]


SIX: list[Points] = [
    _arc(0.22, 0.475, 0.165, 0.200, 0, 360),
    [*_arc(0.375, 0.475, 0.320, 0.430, 180, 255), (0.345, 0.045)],
]
STROKES: dict[int, list[Points]] = {
    1: [[(0.10, 0.155), (0.265, 0.07), (0.265, 0.675)]],
    2: [[*_arc(0.22, 0.22, 0.165, 0.175, 190, 400), (0.065, 0.675), (0.40, 0.675)]],
    3: [
        [*_arc(0.205, 0.205, 0.155, 0.16, 200, 440), (0.155, 0.35)],
        [(0.155, 0.35), *_arc(0.205, 0.51, 0.175, 0.165, -80, 160)],
    ],
    4: [[(0.30, 0.675), (0.30, 0.05), (0.04, 0.49), (0.41, 0.49)]],
    5: [[(0.38, 0.05), (0.105, 0.05), (0.08, 0.345), *_arc(0.21, 0.475, 0.175, 0.20, 230, 515)]],
    6: SIX,
    7: [[(0.05, 0.05), (0.395, 0.05), (0.165, 0.675)]],
    8: [_arc(0.22, 0.205, 0.145, 0.16, 0, 360), _arc(0.22, 0.52, 0.17, 0.158, 0, 360)],
    9: _turned(SIX),
}


def _segments(digit: int) -> Tensor:
    """The straight pieces of a digit's strokes: (S, 2, 2), first and last point."""
    pieces = [[a, b] for line in STROKES[digit] for a, b in pairwise(line)]
    return torch.tensor(pieces, device="cpu")


@cache
def distance_tables(device: torch.device) -> Tensor:
    """Return each digit's distance (9, 1, h, w) float32 to its strokes' middle lines, in em; made once a device."""
    rows, columns = (round((size + 2 * EDGE) * CELLS) for size in (HEIGHT, WIDTH))
    y, x = torch.meshgrid(
        (torch.arange(rows, device="cpu") + 0.5) / CELLS - EDGE,
        (torch.arange(columns, device="cpu") + 0.5) / CELLS - EDGE,
        indexing="ij",
    )
    points = torch.stack([x, y], dim=-1)[..., None, :]  # (h, w, 1, 2)
    tables = []
    for digit in range(1, 10):
        start, end = _segments(digit).unbind(1)
        along = end - start
        share = ((points - start) * along).sum(-1) / along.square().sum(-1)
        nearest = start + share.clamp(0, 1)[..., None] * along
        tables.append((points - nearest).norm(dim=-1).amin(-1))
    return torch.stack(tables)[:, None].to(device)


def draw_digits(digits: Tensor, corners: Tensor, sizes: Tensor, window: int, stroke: float | Tensor = STROKE) -> Tensor:
    """Draw digits: how much of each pixel of a window they cover, (M, window, window) in [0, 1].

    digits (M,) int64 in 1..9; corners (M, 2): upper left corners (x, y) in pixels of the window; sizes (M,): pixels an
    em; stroke: half the thickness in em, a number or (M, 1, 1).
    """
    tables = distance_tables(digits.device)[digits - 1]  # (M, 1, h, w)
    rows, columns = tables.shape[-2:]
    pixel = torch.arange(window, device=digits.device) + 0.5
    x, y = (((pixel - corners[:, i, None]) / sizes[:, None] + EDGE) * CELLS for i in (0, 1))
    lines = torch.broadcast_tensors(2 * x[:, None] / columns - 1, 2 * y[:, :, None] / rows - 1)
    grid = torch.stack(lines, dim=-1)  # (M, window, window, 2)
    distance = F.grid_sample(tables, grid, padding_mode="border", align_corners=False)[:, 0]
    return ((stroke - distance) * sizes[:, None, None] + 0.5).clamp(0, 1)
