"""Places for the objects of an image: circles that do not touch.

The benchmark takes its circles from a file of precomputed ones. These are drawn in turn, largest first, each at a
uniformly random place among those tried that keeps clear of the circles before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRIED = 256  # places a circle, the last quarter of them for ever smaller ones
SHRUNK = 0.4  # size of the last circle that is tried
GAP = 0.02  # smallest distance of two circles, and of a circle and the border, in image sides: 2.5 of 128 pixels


def place_circles(radii: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Place circles (B, K) of these radii in unit squares: centres (B, K, 2) as (x, y), and radii (B, K).

    A circle of radius 0 is absent. One that fits at none of the places tried first shrinks until it does; one that then
    fits nowhere either gets radius 0, or what room there is.
    """
    batch, count = radii.shape
    device = radii.device
    order = radii.argsort(1, descending=True)
    sorted_radii = radii.gather(1, order)
    sizes = torch.linspace(4 - 3 * SHRUNK, SHRUNK, TRIED, device=device).clamp(max=1)
    centres = torch.full((batch, count, 2), -9.0, device=device)  # far away: in nobody's way
    placed = torch.zeros_like(radii)
    for i in range(count):
        reach = sorted_radii[:, i, None] * sizes + GAP  # (B, TRIED)
        tried = torch.rand(batch, TRIED, 2, generator=generator, device=device)
        tried = reach[..., None] + tried * (1 - 2 * reach)[..., None]
        before = slice(max(i, 1))
        room = (torch.cdist(tried, centres[:, before]) - placed[:, None, before]).amin(2) - reach
        best = torch.where((room >= 0).any(1), (room >= 0).int().argmax(1), room.argmax(1))[:, None]
        centres[:, i] = tried.gather(1, best[..., None].expand(-1, -1, 2))[:, 0]
        placed[:, i] = (reach - GAP + room.clamp(max=0)).gather(1, best).clamp(min=0)[:, 0]
    back = order.argsort(1)
    return centres.gather(1, back[..., None].expand(-1, -1, 2)), placed.gather(1, back)
