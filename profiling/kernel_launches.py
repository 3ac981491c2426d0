"""Launches of every Triton kernel, recorded on the CPU as its launcher makes them, to be compiled without a GPU.

The shapes are those of the bundled models and of the published networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from ipr_fast import Schedule
from ipr_fast.kernels import (
    accept,
    advance,
    categorical,
    context_mask,
    denoise,
    group_norm,
    linear,
    map_sum,
    mask_tokens,
    modulated_norm,
    partial_attention,
    pixel_features,
    pixel_head,
    renoise,
    residual_norm,
    reveal,
    slot_inputs,
    threshold,
)
from ipr_fast.kernels.launch import DTYPES
from ipr_fast.kernels.philox import seed_tensor


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel by its launcher."""

    case: str
    kernel: Any
    arguments: tuple
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel and records its launches."""

    def __init__(self, kernel: Any, case: str, launches: list[Launch]) -> None:
        self.kernel, self.case, self.launches = kernel, case, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append(Launch(self.case, self.kernel, arguments, options))


def record(case: str, module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """Return the launches of a module's kernels by `call`."""
    launches: list[Launch] = []
    kernels = {name: k for name, k in vars(module).items() if isinstance(k, triton.runtime.JITFunction)}
    kernels = {name: kernel for name, kernel in kernels.items() if name.endswith("_kernel")}
    with patch.multiple(module, **{name: Recorder(kernel, case, launches) for name, kernel in kernels.items()}):
        call()
    return launches


def launches() -> Iterator[Launch]:
    """Return launches of all shipped configurations: the 4x4 and 9x9 transformers, the published UNets."""
    step = {
        "4x4": (16, 4, 64),
        "9x9": (81, 20, 784),
        "Even Pixels": (64, 16, 48),
        "1024": (1024, 1024, 4),
    }
    for name, sizes in step.items():
        yield from step_launches(name, *sizes)
    for keeps_best in (False, True):
        yield from record("with best" if keeps_best else "without best", accept, partial(decide, keeps_best))
    for patches in (256, 2048, 4096):
        yield from renoise_launches(f"{patches}", patches, patches, 4)
    for positions in (81, 1024, 4096):
        yield from token_launches(f"{positions}", positions)
    heads = {"4x4": (16, 4, 6, 16), "9x9": (81, 20, 6, 64), "wide": (256, 64, 2, 128)}
    attentions = {"bundled 9x9": (81, 20, 8, 16)} | heads
    maps = {  # channels of both maps, pixels and cells a side
        "Even Pixels": (64, 0, 32, 8),
        "Even Pixels, skip": (128, 64, 32, 0),
        "Sudoku": (128, 0, 252, 9),
        "Sudoku, skip": (256, 128, 63, 0),
        "coarse": (512, 256, 32, 32),
    }
    for rows, columns, inputs, gelu in (
        (64, 384, 96, True),
        (4096, 96, 384, False),
        (81_920, 768, 256, False),
        (81_920, 256, 785, False),
    ):
        case = f"{rows:,} x {inputs} x {columns}" + (", GELU" if gelu else "")
        yield from record(case, linear, partial(multiply, rows, columns, inputs, gelu))
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name, (tokens, slots, *of_head) in attentions.items():
            for case, queries in ((f"{name}, {kind}", slots), (f"{name}, {kind}, all", tokens)):
                call = partial(attend, dtype, tokens, queries, *of_head)
                yield from record(case, partial_attention, call)
            call = partial(attend_in_context, dtype, tokens, *of_head)
            yield from record(f"{name}, {kind}, context", partial_attention, call)
        for name, sizes in heads.items():
            tokens, slots = sizes[:2]
            yield from record(f"{name}, {kind}", context_mask, partial(mask_context, dtype, tokens, slots))
            for case, tables in ((f"{name}, {kind}", False), (f"{name}, {kind}, tables", True)):
                yield from record(case, modulated_norm, partial(layer_norm, dtype, tables, *sizes))
                yield from record(case, residual_norm, partial(gated_norm, dtype, tables, *sizes))
            yield from record(f"{name}, {kind}, embeds", residual_norm, partial(embedded_norm, dtype, *sizes))
        yield from record(f"Even Pixels, {kind}", pixel_features, partial(encode_pixels, dtype, 16, 3, 16, 32))
        yield from record(f"Even Pixels, {kind}", pixel_head, partial(read_pixels, dtype, 16, 3, 16, 16))
        for name, sizes in maps.items():
            yield from record(f"{name}, {kind}", group_norm, partial(norm_map, dtype, *sizes))
        for case, two in ((kind, True), (f"{kind}, bias alone", False)):
            yield from record(f"Sudoku, {case}", map_sum, partial(add_maps, dtype, two))
        for vocabulary in (10, 50_258, 126_464):
            for how in ("whole", "greedy", "restricted"):
                call = partial(draw_tokens, dtype, vocabulary, how)
                yield from record(f"{vocabulary:,}, {kind}, {how}", categorical, call)
            call = partial(find_threshold, dtype, vocabulary)
            yield from record(f"{vocabulary:,}, {kind}", threshold, call)


def step_launches(name: str, patches: int, slots: int, numel: int) -> Iterator[Launch]:
    """Return launches of the engine's operations, for two chains."""
    yield from renoise_launches(name, patches, slots, numel)
    z, index, count = torch.zeros(2, patches, numel), torch.zeros(2, slots, dtype=torch.int32), torch.zeros(2).int()
    level, number, done = torch.ones(2, slots), torch.tensor(1), torch.ones(2, dtype=torch.int64)
    tables = Schedule(10, 0.8).tables(patches)._asdict()
    at = {"count": count, "step": done, "log_variance": level}
    rows = {"row": torch.zeros(2, slots, dtype=torch.int64), "levels": level.flatten()}
    for case, more in ((name, {}), (f"{name}, rows", rows)):
        yield from record(case, advance, partial(advance.advance, index, level, level, **at, **tables, **more))
    counters = {"seed": seed_tensor(1, "cpu"), "iteration": number, "chain_ids": torch.arange(2)}
    for dtype in DTYPES:
        gather = partial(slot_inputs.slot_inputs, z, index, level, level[0], dtype)
        yield from record(f"{name}, {str(dtype).removeprefix('torch.')}", slot_inputs, gather)
        velocity = torch.zeros(2, slots, numel, dtype=dtype)
        step = {"index": index, "level": level, "next_level": level, "velocity": velocity, "variance_mix": velocity}
        call = partial(denoise.denoise, z, **step, stochasticity=0.5, temperature=1.0, step=done, **counters)
        kind = str(dtype).removeprefix("torch.")
        yield from record(f"{name}, {kind}", denoise, call)
        call = partial(call, mix_is_logit=True, slot_values=torch.zeros_like(velocity))
        yield from record(f"{name}, {kind}, slots", denoise, call)


def renoise_launches(name: str, patches: int, slots: int, numel: int) -> Iterator[Launch]:
    """Return launches that begin an iteration, for two chains: with a choice, and with a mask."""
    z, index, count = torch.zeros(2, patches, numel), torch.zeros(2, slots, dtype=torch.int32), torch.zeros(2).int()
    free, number = torch.ones(2, patches, dtype=torch.bool), torch.tensor(1)
    into = renoise.Slots(index, count, torch.ones(2, slots), index.clone(), count.long())
    counters = {"seed": seed_tensor(1, "cpu"), "iteration": number, "chain_ids": torch.arange(2)}
    for how, choice in (("chosen", renoise.PatchChoice(free, count.long(), number)), ("mask", None)):
        call = partial(renoise.renoise, z, free, into, stream=1, choice=choice, **counters)
        yield from record(f"{name}, {how}", renoise, call)


def decide(keeps_best: bool) -> None:
    """Accept or reject the proposals of two chains of MNIST Sudoku."""
    reward, values = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 81, 784)
    kept, chains = accept.Kept(values, reward), torch.ones(2, dtype=torch.bool)
    accept.accept(
        values,
        reward,
        kept=kept,
        accepted=chains,
        temperature=reward[0],
        iteration=torch.tensor(1),
        chain_ids=torch.arange(2),
        seed=seed_tensor(1, "cpu"),
        best=kept if keeps_best else None,
        improved=chains if keeps_best else None,
    )


def token_launches(name: str, positions: int) -> Iterator[Launch]:
    """Return launches that begin an iteration of tokens and reveal them, for two chains whose positions are active."""
    tokens, free = torch.zeros(2, positions, dtype=torch.int64), torch.ones(2, positions, dtype=torch.bool)
    index, count = torch.zeros(2, positions, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    number, score = torch.tensor(1), torch.zeros(2, positions)
    of_chains = {"index": index, "count": count, "step": count.long(), "mask_id": 10, "chain_ids": torch.arange(2)}
    counters = of_chains | {"seed": seed_tensor(1, "cpu")}
    for how, choice in (("chosen", renoise.PatchChoice(free, count.long(), number)), ("mask", None)):
        call = partial(mask_tokens.mask_tokens, tokens, free.clone(), choice=choice, **counters)
        yield from record(f"{name}, {how}", mask_tokens, call)
    table = torch.zeros(positions + 1, 4)
    by_count = {"score": score, "visible": table.int(), "reveal": None, "sigma": None}
    remasks = {"score": None, "visible": table.int(), "reveal": None, "sigma": table, "psi": score, "confidence": score}
    by_chance = {"score": None, "visible": None, "reveal": table, "sigma": table}
    by_quality = {"score": score, "visible": table.int(), "reveal": None, "sigma": table, "psi": score}
    for how, options in (
        ("by score", by_count),
        ("remasks", remasks),
        ("by chance", by_chance),
        ("by quality", by_quality),
    ):
        call = partial(reveal.reveal, tokens, tokens, iteration=number, hidden=index.clone(), **options, **counters)
        yield from record(f"{name}, {how}", reveal, call)


def attend(dtype: torch.dtype, tokens: int, slots: int, heads: int, head_size: int) -> None:
    width = heads * head_size
    qkv, cache = torch.zeros(2, slots, 3 * width, dtype=dtype), torch.zeros(2 * tokens + 1, 2 * width, dtype=dtype)
    slot, place = torch.zeros(2, tokens + 1, dtype=torch.int32), torch.zeros(2, slots, dtype=torch.int64)
    partial_attention.partial_attention(qkv[..., :width], qkv[..., width:], cache, slot, place, heads=heads)


def attend_in_context(dtype: torch.dtype, tokens: int, heads: int, head_size: int) -> None:
    width = heads * head_size
    qkv, cache = torch.zeros(2, tokens, 3 * width, dtype=dtype), torch.zeros(2 * tokens + 1, 2 * width, dtype=dtype)
    slot, bias = torch.zeros(2, tokens + 1, dtype=torch.int32), torch.zeros(2, 1, 1, tokens, dtype=dtype)
    partial_attention.context_attention(qkv[..., :width], qkv[..., width:], cache, slot, bias, heads=heads)


def multiply(rows: int, columns: int, inputs: int, gelu: bool) -> None:
    x, parts = torch.empty(rows, inputs), torch.zeros(2, columns, inputs)
    linear.linear(x, parts, parts[0, :, 0].contiguous(), gelu=gelu)


def mask_context(dtype: torch.dtype, tokens: int, slots: int) -> None:
    index, count, slot = (torch.zeros(*shape, dtype=torch.int32) for shape in ((2, slots), (2,), (2, tokens + 1)))
    context_mask.context_mask(index, count, slot, dtype)


def layer_norm(dtype: torch.dtype, tables: bool, tokens: int, slots: int, heads: int, head_size: int) -> None:
    h, (scale, shift, _), row = modulated(dtype, tables, slots, heads * head_size)
    modulated_norm.modulated_layer_norm(h, scale, shift, eps=1e-6, row=row)


def gated_norm(dtype: torch.dtype, tables: bool, tokens: int, slots: int, heads: int, head_size: int) -> None:
    h, (scale, shift, gate), row = modulated(dtype, tables, slots, heads * head_size)
    residual_norm.gated_norm(h, gate, h, scale, shift, eps=1e-6, row=row)


def embedded_norm(dtype: torch.dtype, tokens: int, slots: int, heads: int, head_size: int) -> None:
    h, (scale, shift, _), row = modulated(dtype, True, slots, heads * head_size)
    embedding, index = torch.zeros(tokens, h.shape[-1], dtype=dtype), torch.zeros(h.shape[:2], dtype=torch.int32)
    residual_norm.embedded_norm(embedding, index, h, scale, shift, eps=1e-6, row=row)


def modulated(dtype: torch.dtype, tables: bool, slots: int, width: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Return tokens, three of their six modulation slices, and each token's row if these come from a table."""
    h, of = torch.zeros(2, slots, width, dtype=dtype), (16,) if tables else (2, slots)
    row = torch.zeros(2, slots, dtype=torch.int64) if tables else None
    return h, list(torch.zeros(*of, 6 * width, dtype=dtype).chunk(6, dim=-1)[:3]), row


def encode_pixels(dtype: torch.dtype, slots: int, channels: int, pixels: int, features: int) -> None:
    z, weight = torch.zeros(2, slots, channels * pixels), torch.zeros(features, channels, dtype=dtype)
    pixel_features.pixel_features(z, weight, weight[:, 0])


def read_pixels(dtype: torch.dtype, slots: int, channels: int, pixels: int, hidden: int) -> None:
    weights = torch.zeros(2, slots, sum(pixel_head.sizes(channels, hidden)) + 1, dtype=dtype)
    z, level = torch.zeros(2, slots, channels * pixels), torch.ones(2, slots)
    pixel_head.pixel_head(weights, z, level, channels=channels, hidden=hidden, floor=0.05)


def norm_map(dtype: torch.dtype, channels: int, others: int, size: int, cells: int) -> None:
    """With rows for cells, where there are cells; with a second map and biases, where that has channels."""
    h, weight = torch.zeros(1, channels, size, size, dtype=dtype), torch.zeros(channels + others, dtype=dtype)
    more = {}
    if cells:
        index = torch.zeros(1, cells, cells, dtype=torch.int64)
        more = {"rows": torch.zeros(4, channels + others, dtype=dtype), "index": index}
    if others:
        more |= {"other": torch.zeros(1, others, size, size, dtype=dtype), "shift": weight.float()}
    group_norm.group_norm(h, weight, weight, groups=32, eps=1e-5, **more)


def add_maps(dtype: torch.dtype, two: bool) -> None:
    h = torch.zeros(1, 128, 252, 252, dtype=dtype).to(memory_format=torch.channels_last)
    map_sum.map_sum(h, torch.zeros(128), h if two else None)


def draw_tokens(dtype: torch.dtype, vocabulary: int, how: str) -> None:
    """Draw a token for each of eight slots: at temperature 1, at 0, or at 0.7 with a threshold and forbidden ids."""
    logits, number, restricted = torch.zeros(2, 4, vocabulary, dtype=dtype), torch.tensor(1), how == "restricted"
    categorical.categorical(
        logits,
        index=torch.zeros(2, 4, dtype=torch.int32),
        step=torch.zeros(2, dtype=torch.int64),
        iteration=number,
        chain_ids=torch.arange(2),
        seed=seed_tensor(1, "cpu"),
        out=categorical.Drawn.empty(2, 4, "cpu"),
        temperature={"whole": 1.0, "greedy": 0.0, "restricted": 0.7}[how],
        threshold=torch.zeros(2, 4) if restricted else None,
        forbidden=torch.zeros(vocabulary, dtype=torch.bool) if restricted else None,
    )


def find_threshold(dtype: torch.dtype, vocabulary: int) -> None:
    """Find the thresholds of eight slots by top-k, and by top-p in what it keeps."""
    threshold.threshold(
        torch.zeros(2, 4, vocabulary, dtype=dtype),
        index=torch.zeros(2, 4, dtype=torch.int32),
        out=torch.zeros(2, 4),
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        nucleus="inner",
        forbidden=torch.zeros(vocabulary, dtype=torch.bool),
    )
