"""The Triton kernels against what the device can do, in one run: bandwidth against a copy, attention against PyTorch's.

    python bench/kernels.py [--batch 4096] [--out FILE.json]      needs a CUDA device

Every kernel first has to equal its twin. A memory-bound kernel's bandwidth is the bytes that it must move over its time
(median of repeated launches, caches flushed before each), as a share of a device copy's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast import Schedule
from ipr_fast.kernels import advance, denoise, modulated_norm, partial_attention, renoise
from ipr_fast.kernels.philox import seed_tensor

SHAPES = {"digit-sudoku-4x4": (16, 4, 64), "9x9": (81, 20, 784), "Even Pixels": (64, 16, 48)}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, with the caches flushed before each."""
    if device.type != "cuda":
        function()
        return float("nan")
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=200, return_mode="median") / 1000


def compare(
    name: str,
    moved: int,
    run: Callable[[], Sequence[Tensor]],
    twin: Callable[[], Sequence[Tensor]],
    copies: float,
    device: torch.device,
    reset: Callable[[], object] = lambda: None,
) -> dict:
    """Check the tensors that `run` gives against those of its `twin`, each after `reset`; then time `run`."""
    reset()
    found = [tensor.clone() for tensor in run()]
    reset()
    for ours, theirs in zip(found, twin(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    time = seconds(run, device)
    return {"operation": name, "bytes": moved, "seconds": time, "of_a_copy": moved / time / copies}


def step_rows(name: str, batch: int, device: torch.device, copies: float) -> list[dict]:
    """renoise, advance and denoise, every slot moving."""
    patches, slots, numel = SHAPES[name]
    z, noise = (torch.randn(batch, patches, numel, device=device) for _ in range(2))
    free = torch.ones(batch, patches, dtype=torch.bool, device=device)
    seed, number, ids = seed_tensor(1, device), torch.tensor(1, device=device), torch.arange(batch, device=device)
    index, start = (torch.zeros(batch, slots, dtype=torch.int32, device=device) for _ in range(2))
    count = torch.full((batch,), slots, dtype=torch.int32, device=device)
    level, next_level, order = (torch.ones(batch, slots, device=device) for _ in range(3))
    into, mask = renoise.Slots(index, count, level, start), free.clone()
    choice = renoise.PatchChoice(free, count.long(), number)
    counters = {"seed": seed, "iteration": number, "chain_ids": ids}

    def fused_renoise() -> Sequence[Tensor]:
        renoise.renoise(z, mask, into, stream=1, choice=choice, **counters)
        return z, mask, *into

    def plain_renoise() -> Sequence[Tensor]:
        renoise._renoise(z, mask, into, seed, 1, number, ids, choice, None)
        return z, mask, *into

    tables = Schedule(10, 0.8).tables(patches).to(device)

    def fused_advance() -> Sequence[Tensor]:
        advance.advance(start, next_level, count=count, step=number, log_variance=order, **tables._asdict())
        return start, next_level

    def plain_advance() -> Sequence[Tensor]:
        advance._advance(start, next_level, count, number, order, *tables)
        return start, next_level

    half, (u, v) = torch.full((batch, slots), 0.5, device=device), torch.randn(2, batch, slots, numel, device=device)
    step = {"index": index, "level": level, "next_level": half, "velocity": u, "variance_mix": v, "step": number}

    def fused_denoise() -> Sequence[Tensor]:
        denoise.denoise(z, **step, stochasticity=0.5, temperature=1.0, **counters)
        return (z,)

    def plain_denoise() -> Sequence[Tensor]:
        denoise._denoise(z, index, level, half, u, v, 0.5, 1.0, (seed, 2, number, number, ids), None)
        return (z,)

    here = (copies, device)
    moved = renoise.bytes_moved(batch, patches, slots, numel)
    rows = [compare(f"{name}: renoise", moved, fused_renoise, plain_renoise, *here, lambda: z.copy_(noise))]
    moved = advance.bytes_moved(batch, slots)
    rows.append(compare(f"{name}: advance", moved, fused_advance, plain_advance, *here, lambda: start.fill_(-1)))
    moved = denoise.bytes_moved(batch * slots, numel, 4, True)
    rows.append(compare(f"{name}: denoise", moved, fused_denoise, plain_denoise, *here, lambda: z.copy_(noise)))
    return rows


def norm_rows(batch: int, device: torch.device, copies: float) -> list[dict]:
    """The transformer's and the UNet's norm."""
    h, both = torch.randn(batch, 20, 384, device=device), torch.randn(batch, 20, 6 * 384, device=device)
    scale, shift, *_ = both.chunk(6, dim=-1)
    samples = max(1, batch // 32)
    image = torch.randn(samples, 64, 32, 32, device=device).to(memory_format=torch.channels_last)
    original = image.clone()
    (weight, bias), rows = torch.randn(2, 64, device=device), torch.randn(17, 64, device=device)
    index = torch.randint(0, 17, (samples, 8, 8), device=device)
    options = {"groups": 32, "eps": 1e-5, "rows": rows, "index": index}
    return [
        compare(
            "layer norm, 384 wide",
            modulated_norm.layer_norm_bytes(batch, 20, 384, 4),
            lambda: (modulated_norm.modulated_layer_norm(h, scale, shift, eps=1e-6),),
            lambda: (modulated_norm._modulated_layer_norm(h, scale, shift, 1e-6),),
            copies,
            device,
        ),
        compare(
            "group norm, 64 x 32 x 32",
            modulated_norm.group_norm_bytes(samples, 64, 32, 32, 4),
            lambda: (modulated_norm.group_norm(image, weight, bias, **options),),
            lambda: (modulated_norm._group_norm(image, weight, bias, *options.values()),),
            copies,
            device,
            lambda: image.copy_(original),  # the twin may overwrite it
        ),
    ]


def attention_rows(batch: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Partial attention of N / 4 queries against PyTorch's attention of all N with a mask."""
    rows = []
    for name, tokens, heads, size in (("4x4", 16, 6, 16), ("9x9", 81, 6, 64), ("256 tokens", 256, 6, 64)):
        slots, width = tokens // 4, heads * size
        q, keys, values = (torch.randn(batch, n, width, device=device, dtype=dtype) for n in (slots, tokens, tokens))
        found = partial_attention.partial_attention(q, keys, values, heads=heads).float()
        expected = partial_attention._partial_attention(q, keys, values, heads).float()
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (keys, values))
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device)
        ours = seconds(
            lambda q=q, k=keys, v=values, h=heads: partial_attention.partial_attention(q, k, v, heads=h), device
        )
        theirs = seconds(lambda k=k, v=v, m=mask: F.scaled_dot_product_attention(k, k, v, attn_mask=m), device)
        moved = partial_attention.bytes_moved(batch, slots, tokens, width, q.element_size())
        row = {"operation": f"partial attention, {name}", "bytes": moved, "seconds": ours}
        rows.append(row | {"times_faster": theirs / ours})
    return rows


def measure(batch: int, device: torch.device) -> dict:
    buffer = torch.empty(64 * 2**20 if device.type == "cuda" else 2**10, device=device)
    target = torch.empty_like(buffer)
    copies = 2 * buffer.nbytes / seconds(lambda: target.copy_(buffer), device)
    rows = [row for name in SHAPES for row in step_rows(name, batch, device, copies)]
    rows += norm_rows(batch, device, copies)
    rows += attention_rows(batch, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {"batch": batch, "copy_bytes_per_second": copies, "rows": rows, "environment": environment.describe()}


def report(results: dict) -> str:
    """The measurement as a Markdown table."""
    lines = [
        "| operation | us | of a copy's bandwidth | times faster than all tokens |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        share = f"{100 * row['of_a_copy']:.0f} %" if "of_a_copy" in row else ""
        faster = f"{row['times_faster']:.1f}" if "times_faster" in row else ""
        lines.append(f"| {row['operation']} | {1e6 * row['seconds']:.1f} | {share} | {faster} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    results = measure(arguments.batch, torch.device("cuda"))
    print(report(results))
    environment.write(results, arguments.out)


if __name__ == "__main__":
    main()
