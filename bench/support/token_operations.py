"""The operations that draw tokens: categorical, and the threshold of top-p; see operations.py."""

from __future__ import annotations

import torch

from ipr_fast.kernels import categorical, logits, threshold
from support import definitions
from support.operations import ITERATION, SEED, Inputs, Operation

TOP_P = 0.9


def draw_tokens(vocabulary: int, batch: int, device: torch.device, seed: int) -> Operation:
    """A token for one slot of each chain, at temperature 1. On a GPU the logits are bfloat16."""
    inputs, row, index = _rows(vocabulary, batch, device, seed)
    step, counters = inputs.integers(100, batch), inputs.counters(batch)
    out, order = categorical.Drawn.empty(batch, 1, device), ("seed", "iteration", "chain_ids")
    seed_, iteration, ids = (counters[name] for name in order)

    def twin() -> categorical.Drawn:
        categorical._categorical(row, index, (seed_, step, iteration, ids), out, 1.0, None, None)
        return out

    return Operation(
        lambda: categorical.categorical(row, index=index, step=step, out=out, **counters),
        twin,
        lambda: definitions.categorical(row, 1.0, SEED, step + 1, ITERATION, ids),
        logits.bytes_moved(batch, vocabulary, row.element_size()),
        6 * row.numel(),
    )


def find_threshold(vocabulary: int, batch: int, device: torch.device, seed: int) -> Operation:
    """The threshold of top-p 0.9 for one slot of each chain, whose logits a GPU reads a dozen times from its cache."""
    _, row, index = _rows(vocabulary, batch, device, seed)
    out = torch.zeros(batch, 1, device=device)

    def twin() -> tuple[torch.Tensor]:
        threshold._threshold(row, index, out, 1.0, None, round(TOP_P * 2**30), False, None)
        return (out,)

    return Operation(
        lambda: (threshold.threshold(row, index=index, out=out, top_p=TOP_P),),
        twin,
        lambda: (definitions.threshold(row, 1.0, TOP_P),),
        logits.bytes_moved(batch, vocabulary, row.element_size()),
        4 * row.numel(),
    )


def _rows(vocabulary: int, batch: int, device: torch.device, seed: int) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """Logits (B, 1, V) with the spread of a language model's, and positions (B, 1)."""
    inputs = Inputs(device, seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row = (3 * inputs.normals(batch, 1, vocabulary)).to(dtype)
    return inputs, row, torch.zeros(batch, 1, dtype=torch.int32, device=device)
