"""Beginnings of a PatchTransformer that already look where a task's rules are.

From random weights, a model of 9x9 boards learns first how digits look, and only later the rules: to find out that
rows, columns and boxes matter, its heads have to stumble over them. Heads that begin by looking there need half as
many boards (`bench/rules.py`). They are an initial value, not a constraint: training may move them.
"""

from __future__ import annotations

import torch

from ipr_fast.models.patch_transformer import PatchTransformer


@torch.no_grad()
def look_along_lines(model: PatchTransformer, strength: float = 1.0) -> None:
    """Let the heads of each layer look along rows, columns and boxes in turn; `strength` scales queries and keys.

    The embeddings of rows, columns and boxes become orthogonal to each other, of the norm that they have anyway, and a
    head's first channels the row's (column's, box's) coordinates of a token. So a query and a key of one row have a
    product, others none. At strength 1 nine tenths of a head's attention then lie on the row's nine cells.

    Draws from torch's global generator. Raises ValueError for a model without boxes, or too narrow.
    """
    position, heads = model.position, model.config.num_heads
    if position.boxes is None:
        raise ValueError("model: it has no boxes, so there are no lines to look along")
    tables, width = (position.rows, position.columns, position.boxes), model.config.width
    size = width // heads
    if sum(len(table) for table in tables) > width or max(len(table) for table in tables) > size:
        lines = max(len(table) for table in tables)
        raise ValueError(
            f"model: a head must have a channel for each of {lines} rows, and the model {3 * lines} of them, "
            f"got width {width} in {heads} heads"
        )
    basis = torch.linalg.qr(torch.randn(width, width))[0].to(position.rows)
    directions = basis[: sum(len(table) for table in tables)].split([len(table) for table in tables])
    for table, direction in zip(tables, directions, strict=True):
        table.copy_(0.5 * width**0.5 * direction)
    for layer in model.layers:
        queries, keys, _ = layer.qkv.weight.view(3, heads, size, width)
        for head in range(heads):
            direction = directions[head % 3]
            queries[head, : len(direction)] = strength * direction
            keys[head, : len(direction)] = strength * direction
