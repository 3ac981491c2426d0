"""Initialisation that biases attention heads toward rows, columns and boxes.

From random weights, a model of 9x9 boards first learns how digits look, and the rules only once its heads have found
rows, columns and boxes by chance. Heads biased toward these learn the rules from half as many boards
(`ipr-fast evaluate initialisation` measures it). It is an initial value, not a constraint: training may move it.
"""

from __future__ import annotations

import torch

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
