"""The operations of a step of tokens: masking, drawing, the threshold of top-p, revealing; see operations.py."""

from __future__ import annotations

import torch

from ipr_fast import TokenSchedule
from ipr_fast.kernels import categorical, logits, mask_tokens, reveal, threshold
from ipr_fast.kernels.renoise import PatchChoice
from support import definitions
from support.operations import ITERATION, SEED, Inputs, Operation

TOP_P = 0.9
IDS = 10  # of a digit; the mask is one more


def mask_chosen(length: int, batch: int, device: torch.device, seed: int) -> Operation:
    """The beginning of an iteration: choose a quarter of each chain's positions, a third of the free ones, and mask."""
    inputs, slots = Inputs(device, seed), length // 4
    free = torch.ones(batch, length, dtype=torch.bool, device=device)
    free.scatter_(1, inputs.subset(batch, length, length // 4), False)
    original, counters = inputs.integers(IDS, batch, length), inputs.counters(batch)
    tokens, mask, iteration = original.clone(), torch.zeros_like(free), counters.pop("iteration")
    choice = PatchChoice(free, torch.full((batch,), slots, device=device), iteration)
    index, count = torch.zeros(batch, slots, device=device).int(), torch.zeros(batch, device=device).int()
    step, ids = torch.zeros(batch, dtype=torch.int64, device=device), counters["chain_ids"]

    def run() -> tuple[torch.Tensor, ...]:
        mask_tokens.mask_tokens(
            tokens, mask, index=index, count=count, step=step, mask_id=IDS, choice=choice, **counters
        )
        return tokens, mask, index, count

    def twin() -> tuple[torch.Tensor, ...]:
        mask_tokens._mask_tokens(tokens, mask, index, count, step, IDS, ids, counters["seed"], choice)
        return tokens, mask, index, count

    def definition() -> tuple[torch.Tensor, ...]:
        return definitions.mask_tokens(original, definitions.choose(free, slots, SEED, ITERATION, ids), IDS)

    moved = mask_tokens.bytes_moved(batch, length, slots)
    return Operation(run, twin, definition, moved, batch * length, lambda: tokens.copy_(original))


def reveal_half_way(length: int, batch: int, device: torch.device, seed: int) -> Operation:
    """The fifth of eight steps: half of the positions hold a token, and those of lowest score follow."""
    inputs, tables, at = Inputs(device, seed), TokenSchedule(8).tables(length), 4
    original = inputs.integers(IDS, batch, length)
    original.scatter_(1, inputs.subset(batch, length, length - length * at // 8), IDS)
    tokens, drawn = original.clone(), inputs.integers(IDS, batch, length)
    score, index = inputs.normals(batch, length).abs(), torch.arange(length, device=device).int().repeat(batch, 1)
    count, step = torch.full((batch,), length, device=device).int(), torch.zeros(batch, device=device).long()
    counters, visible = inputs.counters(batch), tables.visible.to(device)
    number = length * (at + 1) // 8 - length * at // 8

    def reset() -> None:
        tokens.copy_(original)
        step.fill_(at - 1)

    def run() -> tuple[torch.Tensor]:
        given = {"index": index, "count": count, "mask_id": IDS, "visible": visible, "reveal": None, "sigma": None}
        reveal.reveal(tokens, drawn, score=score, step=step, **given, **counters)
        return (tokens,)

    def twin() -> tuple[torch.Tensor]:
        of_chains = step, counters["iteration"], counters["chain_ids"], counters["seed"]
        reveal._reveal(tokens, drawn, score, None, index, count, IDS, (visible, None, None), None, None, *of_chains)
        return (tokens,)

    def definition() -> tuple[torch.Tensor]:
        return (definitions.reveal(original, drawn, score, IDS, number),)

    return Operation(run, twin, definition, reveal.bytes_moved(batch, length, batch * number), batch * length, reset)


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
        dtype=row.dtype,
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
        dtype=row.dtype,
    )


def _rows(vocabulary: int, batch: int, device: torch.device, seed: int) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """Logits (B, 1, V) with the spread of a language model's, and positions (B, 1)."""
    inputs = Inputs(device, seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row = (3 * inputs.normals(batch, 1, vocabulary)).to(dtype)
    return inputs, row, torch.zeros(batch, 1, dtype=torch.int32, device=device)
