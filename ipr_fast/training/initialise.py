"""Initialisation that biases attention heads toward rows, columns and boxes, or toward neighbours.

From random weights, a model of 9x9 boards first learns how digits look, and the rules only once its heads have found
rows, columns and boxes by chance. Heads biased toward these learn the rules from half as many boards
(`ipr-fast evaluate initialisation` measures it). In the same way a model of pictures first learns single patches, and
how they go on in the next one once its heads have found neighbours. It is an initial value, not a constraint: training
may move it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.token_transformer import TokenTransformer


@torch.no_grad()
def bias_heads_to_lines(model: PatchTransformer | TokenTransformer) -> None:
    """Bias the heads of each layer toward rows, columns and boxes in turn.

    The embeddings of all rows, columns and boxes become orthogonal, with their usual norm, and a head's first channels
    read the row (column, box) of a token. So a query and a key have a product only within one row: nine tenths of a
    head's attention lie on the nine cells of the row.

    Draws from torch's global generator. Raises ValueError for a model without boxes, or too narrow.
    """
    position, heads = model.position, model.config.num_heads
    if position.boxes is None:
        raise ValueError("model must have position embeddings of boxes (box_size), got none")
    tables, width = (position.rows, position.columns, position.boxes), model.config.width
    size = width // heads
    if sum(len(table) for table in tables) > width or max(len(table) for table in tables) > size:
        lines = max(len(table) for table in tables)
        raise ValueError(
            f"model must have at least {lines} channels a head and {3 * lines} in all, "
            f"got width {width} in {heads} heads"
        )
    basis = torch.linalg.qr(torch.randn(width, width, device="cpu"))[0].to(position.rows)
    directions = basis[: sum(len(table) for table in tables)].split([len(table) for table in tables])
    for table, direction in zip(tables, directions, strict=True):
        table.copy_(0.5 * width**0.5 * direction)
    for layer in model.layers:
        queries, keys, _ = layer.qkv.weight.view(3, heads, size, width)
        for head in range(heads):
            direction = directions[head % 3]
            queries[head, : len(direction)] = direction
            keys[head, : len(direction)] = direction


@torch.no_grad()
def bias_heads_to_neighbours(model: PatchTransformer) -> None:
    """Bias heads of each layer toward the patch before and after along each dimension, and toward the surroundings.

    The embedding of place r along a dimension of n places becomes waves cos(w r) and sin(w r) of w = pi / n, 3 pi / n,
    ..., with the norm that it has anyway. Of a head that reads them, the product of a query at r, its waves turned by
    w d, and a key at s is a sum of cos(w (r + d - s)), greatest at s = r + d. In turn, heads look one patch back and
    one on along each dimension; two, which read the lower waves alone, at all that is near; two are left as they are.
    A dimension has as many waves as a head's channels allow, two channels each; n over their number is about the
    distance at which a head tells places apart.

    Draws from torch's global generator. Raises ValueError for a model too narrow.
    """
    position, heads, width = model.position, model.config.num_heads, model.config.width
    tables = [table for name, table in position.named_parameters() if name != "boxes"]
    size, waves = width // heads, width // heads // (2 * len(tables))  # waves of a dimension
    if not waves or 2 * waves * len(tables) > width:
        raise ValueError(
            f"model must have at least {2 * len(tables)} channels a head, got width {width} in {heads} heads"
        )
    basis = torch.linalg.qr(torch.randn(width, width, device="cpu"))[0].to(tables[0])
    directions = basis[: 2 * waves * len(tables)].view(len(tables), 2 * waves, width)
    for table, direction in zip(tables, directions, strict=True):
        place = torch.arange(len(table), device=table.device)
        table.copy_(0.5 * (width / waves) ** 0.5 * _waves(place, len(table), waves) @ direction)
    back_and_on = [(axis, step) for axis in range(len(tables)) for step in (-1, 1)]
    for layer in model.layers:
        queries, keys, _ = layer.qkv.weight.view(3, heads, size, width)
        for head in range(heads):
            turn = head % (len(back_and_on) + 4)
            if turn >= len(back_and_on) + 2:
                continue
            near = turn >= len(back_and_on)
            looks, step = (-1, 0) if near else back_and_on[turn]
            for axis, (table, direction) in enumerate(zip(tables, directions, strict=True)):
                turned = _turned(direction, step if axis == looks else 0, len(table))
                first, count = 2 * waves * axis, 2 * max(1, waves // 2) if near else 2 * waves
                scale = (2 * waves / count) ** 0.25
                queries[head, first : first + count] = scale * turned[:count]
                keys[head, first : first + count] = scale * direction[:count]


def _waves(place: Tensor, places: int, waves: int) -> Tensor:
    """Return cos and sin of each wave at places (n,), alternating: (n, 2 waves)."""
    angle = place[:, None] * (math.pi / places) * (2 * torch.arange(waves, device=place.device) + 1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)


def _turned(direction: Tensor, step: int, places: int) -> Tensor:
    """Return the rows (2 waves, width) that read the waves of the place `step` further."""
    place = torch.tensor([step], device=direction.device)
    cos, sin = _waves(place, places, len(direction) // 2)[0].view(-1, 2, 1).unbind(1)
    even, odd = direction[::2], direction[1::2]  # read cos(w r) and sin(w r)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=1).flatten(0, 1)
