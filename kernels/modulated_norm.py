"""GroupNorm and SiLU of a feature map, after an embedding of each cell has been added to it.

    h'(b, c, y, x) = h(b, c, y, x) + rows(index(b, cell of (y, x)), c)
    out            = SiLU(weight(c) (h' - mean(b, group of c)) / sqrt(variance(b, group of c) + eps) + bias(c))

A cell is a square of pixels, and all its pixels add the same row: the embedding is never spread over the pixels.

Shapes: h (B, C, H, W) channels-last; rows (R, C); index (B, rows of cells, columns of cells) int64, numbers
that divide H and W; weight, bias (C,).
Bytes that must move: 2 numbers of h read (once for the statistics, once for the result) and one written, for each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_silu(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    rows: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """The result as a map of its own. With `rows`, h is the caller's to lose: it may be overwritten."""
    if rows is not None:
        cells = F.embedding(index, rows).permute(0, 3, 1, 2)
        batch, channels, down, across = cells.shape
        pixels = h.view(batch, channels, down, h.shape[2] // down, across, h.shape[3] // across)
        pixels.add_(cells[:, :, :, None, :, None])
    return F.silu(torch.group_norm(h, groups, weight, bias, eps), inplace=True)
