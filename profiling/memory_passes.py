"""The bytes of a tick by kind of operator, as on a GPU: those of the network's products, and those of all other passes.

    python profiling/memory_passes.py                                  MNIST Sudoku, 64 chains, float32
    python profiling/memory_passes.py --model "Even Pixels" --chains 256 --bandwidth-gbs 4800

Counted on tensors without data, by bench/support/counts.py: what each operator and each Triton kernel must read and
write. The bandwidth, by default an H100's, turns bytes into the shortest time.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from support.chains import Step
from support.counts import Operation, count
from support.launches import can_be_counted
from support.subjects import makers, num_active

from ipr_fast import Denoiser, Schedule

SCHEDULE = Schedule(2, 0.8)  # no byte of a tick depends on it
PRODUCTS, REST = "products, attention", "everything else"
KINDS = {
    PRODUCTS: "convolution linear linear_kernel addmm addmm_ scaled_dot_product_attention partial_attention_kernel "
    "partial_attention_rows_kernel",
    "norms and activations": "group_norm_kernel group_norm_turns_kernel layer_norm_kernel residual_norm_kernel silu",
    "sums and biases": "add_ map_sum_kernel",
    "concatenations": "cat",
    "upsampling": "upsample_nearest2d",
    REST: "",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


def by_kind(operations: list[Operation]) -> dict[str, tuple[int, int]]:
    """Return the number of operators and the bytes of each kind."""
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for each in operations:
        kind = KIND_OF.get(each.name, REST)
        calls[kind] += 1
        moved[kind] += each.bytes
    return {kind: (calls[kind], moved[kind]) for kind in KINDS}


def tick_of(model: Denoiser, chains: int) -> list[Operation]:
    """Return the operations of a tick on a GPU; the model moves to the device "meta"."""
    step = Step.begun(model.to("meta"), chains, num_active(model), SCHEDULE, "meta", kernels=True)
    return count(step.tick, "meta", kernels=True).operations


def table(operations: list[Operation], bandwidth: float) -> str:
    """Format the bytes of each kind as a Markdown table, with their time at a bandwidth in bytes per second."""
    kinds = by_kind(operations)
    passes = [found for kind, found in kinds.items() if kind != PRODUCTS]
    sums = {"passes beside the products": passes, "all": list(kinds.values())}
    rows = kinds | {name: tuple(map(sum, zip(*found, strict=True))) for name, found in sums.items()}
    lines = ["| kind | operators | GB | ms |", "| --- | ---: | ---: | ---: |"]
    for name, (calls, moved) in rows.items():
        lines.append(f"| {name} | {calls} | {moved / 1e9:.1f} | {1e3 * moved / bandwidth:.1f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    known = makers(smoke=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=known, default="MNIST Sudoku", metavar="MODEL", help=", ".join(known))
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--bandwidth-gbs", type=float, default=3350)
    arguments = parser.parse_args(argv)
    if not can_be_counted():
        parser.error("counting kernels needs Triton, without its interpreter")
    if arguments.chains < 1 or not arguments.bandwidth_gbs > 0:
        parser.error("--chains must be at least 1, --bandwidth-gbs above 0")
    print(f"A tick of {arguments.model}, {arguments.chains} chains, float32, at {arguments.bandwidth_gbs:g} GB/s\n")
    print(table(tick_of(known[arguments.model](), arguments.chains), 1e9 * arguments.bandwidth_gbs))


if __name__ == "__main__":
    main()
