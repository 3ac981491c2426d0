"""Finds the objects of an image: connected areas of the objects' colour, each as a small picture of its own.

A pixel's cover is how far it has come from the background around it to that colour; objects are the connected areas
where it is above a threshold.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.tasks.hues import to_hsv
from ipr_fast.tasks.polygons.drawing import SATURATION, VALUE

MOST = 20  # objects of an image, the largest ones; a good image has at most 11
COVERED = 0.4  # least cover of an object's pixels
SMALLEST_AREA = 8  # pixels of an object; what is smaller is ignored
AROUND = 15  # pixels a side of the window whose background counts
CROP = 32  # pixels a side of an object's picture
MARGIN = 1.2  # side of what the picture shows, in the longer side of the object's box
HUES, NEAR = 72, 0.03  # bins of the hues; largest difference of an object's pixels from the hue, in turns
PURE = 0.08  # scale on which saturation and value may differ from the objects'
ALIKE, RARE = 0.1, 0.01  # deviation of hues like another, in turns; share of an image's pixels that is few
T = TypeVar("T", float, Tensor)


class Objects(NamedTuple):
    """The objects of B images, the largest first.

    crops    (B, MOST, CROP, CROP): cover of an object's pixels in [0, 1], scaled to one size
    sides    (B, MOST): side of what a crop shows, in pixels of the image
    middles  (B, MOST, 2): of the objects' boxes, (x, y) in pixels
    there    (B, MOST) bool: whether there is such an object; else its rows mean nothing
    """

    crops: Tensor
    sides: Tensor
    middles: Tensor
    there: Tensor


def find_objects(images: Tensor) -> Objects:
    """Find the objects of images (B, 3, H, W) in [-1, 1], clamped to [-1, 1]."""
    covered = cover(((images.float() + 1) / 2).clamp(0, 1))
    labels = connected_areas(covered > COVERED)
    batch, _, columns = labels.shape
    flat = labels.flatten(1)
    areas = torch.zeros(batch, flat.shape[1] + 1, device=flat.device)
    areas.scatter_add_(1, flat, torch.ones_like(areas[:, 1:]))
    areas[:, 0] = 0
    area, label = areas.topk(MOST, dim=1)
    pixel = torch.arange(flat.shape[1], device=flat.device).expand(batch, -1)
    x, y = pixel % columns, pixel // columns
    left, right, top, bottom = (
        torch.zeros_like(areas).scatter_reduce_(1, flat, each.float(), how, include_self=False).gather(1, label)
        for each, how in ((x, "amin"), (x, "amax"), (y, "amin"), (y, "amax"))
    )
    middles = torch.stack([left + right + 1, top + bottom + 1], dim=-1) / 2
    sides = side_of(torch.maximum(right - left, bottom - top) + 1)
    return Objects(_crops(covered, labels, label, middles, sides), sides, middles, area >= SMALLEST_AREA)


def side_of(length: T) -> T:
    """Return the side of the square that shows an object, for the longer side of its box; in pixels."""
    return MARGIN * length + 2


def object_colour(images: Tensor) -> Tensor:
    """Return the colour of the objects of images (B, 3, H, W) in [0, 1]: (B, 3).

    Its hue has many pixels of the objects' saturation and value, and few others have a hue like it.
    """
    hue, saturation, value = (each.flatten(1) for each in to_hsv(images))
    pure = torch.exp(-((saturation - SATURATION) ** 2 + (value - VALUE) ** 2) / PURE**2)
    bins = (hue * HUES).long().clamp(max=HUES - 1)
    objects, others = (
        torch.zeros(len(hue), HUES, device=hue.device).scatter_add_(1, bins, weight) for weight in (pure, 1 - pure)
    )
    objects = objects + 0.5 * (objects.roll(1, 1) + objects.roll(-1, 1))
    bin_of = torch.arange(HUES, device=hue.device)
    apart = ((bin_of - bin_of[:, None] + HUES // 2) % HUES - HUES // 2) / HUES
    like = others @ torch.exp(-((apart / ALIKE) ** 2) / 2)
    score = objects / (like + RARE * hue.shape[1])
    peak = (score.argmax(1, keepdim=True) + 0.5) / HUES
    away = ((hue - peak + 0.5) % 1 - 0.5).abs()
    chosen = (pure * (away < NEAR))[:, None] + 1e-12
    return (images.flatten(2) * chosen).sum(2) / chosen.sum(2)


def cover(images: Tensor) -> Tensor:
    """Return how much of each pixel an object covers, of images (B, 3, H, W) in [0, 1]: (B, H, W) in [0, 1].

    A pixel that mixes the objects' colour with the background around it has the mixture's share.
    """
    colour = object_colour(images)[..., None, None]
    distance = (images - colour).square().sum(1, keepdim=True).sqrt()
    away = (distance > 0.3).float()
    total = torch.cat([distance * away, away], dim=1)
    for window in ((AROUND, 1), (1, AROUND)):
        total = F.avg_pool2d(total, window, 1, (window[0] // 2, window[1] // 2))
    everywhere = (distance * away).sum((2, 3), keepdim=True) / away.sum((2, 3), keepdim=True).clamp(min=1)
    around = torch.where(total[:, 1:] > 0, total[:, :1] / total[:, 1:].clamp(min=1e-6), everywhere).clamp(min=0.3)
    return (1 - distance / around).clamp(0, 1)[:, 0]


def connected_areas(mask: Tensor) -> Tensor:
    """Label the connected areas of masks (B, H, W): (B, H, W) int64, 0 outside, equal within an area; 8 neighbours.

    A pixel takes the largest label about it, then that pixel's own label, until nothing changes.
    """
    rows, columns = mask.shape[1:]
    first = torch.arange(1, rows * columns + 1, device=mask.device).view(1, rows, columns)
    labels = (first * mask).float()  # whole numbers below 2**24, kept exactly
    while True:
        grown = _spread(labels) * mask
        flat = F.pad(grown.flatten(1), (1, 0))
        for _ in range(3):
            flat = flat.gather(1, flat.long())
        grown = flat[:, 1:].view_as(labels)
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def _spread(images: Tensor) -> Tensor:
    """Return the largest of each pixel and its eight neighbours, of images (B, H, W); on a CPU faster than a pool."""
    for dim in (1, 2):
        length, spread = images.shape[dim] - 1, images.clone()
        lower, upper = spread.narrow(dim, 0, length), spread.narrow(dim, 1, length)
        lower.copy_(torch.maximum(lower, images.narrow(dim, 1, length)))
        upper.copy_(torch.maximum(upper, images.narrow(dim, 0, length)))
        images = spread
    return images


def _crops(covered: Tensor, labels: Tensor, label: Tensor, middles: Tensor, sides: Tensor) -> Tensor:
    """Cut objects out, with an edge of one pixel, without what belongs to other objects: (B, MOST, CROP, CROP)."""
    rows, columns = covered.shape[1:]
    owner = torch.where(labels > 0, labels.float(), _spread(labels.float()))
    step = (torch.arange(CROP, device=covered.device) + 0.5) / CROP - 0.5
    x, y = (middles[..., i, None] + sides[..., None] * step for i in (0, 1))  # (B, MOST, CROP)
    grid = torch.stack(
        torch.broadcast_tensors(2 * x[..., None, :] / columns - 1, 2 * y[..., :, None] / rows - 1), dim=-1
    ).flatten(1, 2)
    seen = F.grid_sample(covered[:, None], grid, align_corners=False).unflatten(2, (-1, CROP))[:, 0]
    whose = F.grid_sample(owner[:, None], grid, mode="nearest", align_corners=False).unflatten(2, (-1, CROP))[:, 0]
    return seen * (whose == label[..., None, None])
