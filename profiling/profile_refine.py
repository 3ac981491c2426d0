"""Where the time of a refinement goes.

    python profiling/profile_refine.py [--boards 512] [--iters 3] [--device cpu] [--trace trace.json]

Refines boards with the bundled model under torch's profiler, after a first call that warms up, and prints the share of
each kind of operator. `--trace` writes a Chrome trace as well (open it in chrome://tracing or ui.perfetto.dev).
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

import ipr_fast

KINDS = {
    "matrix products": ("mm", "linear", "bmm"),
    "attention": ("scaled_dot_product",),
    "norms and activations": ("layer_norm", "gelu", "silu", "sigmoid"),
    "random numbers": ("xor", "rshift", "bitwise_and", "log", "cos", "sin", "sqrt"),
    "moving and combining": ("copy", "add", "mul", "where", "index", "gather", "scatter", "cat", "sub", "fill"),
}


def kind_of(operator: str) -> str:
    """The first kind one of whose words is in the operator's name."""
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), "everything else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=512)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trace")
    arguments = parser.parse_args()
    model = ipr_fast.load_model("digit-sudoku-4x4", device=arguments.device)
    x = ipr_fast.generate_batch(arguments.boards, model=model, schedule=ipr_fast.Schedule(1, 1.0))
    on_gpu = arguments.device.startswith("cuda")

    def refine() -> None:
        ipr_fast.refine_batch(x, ipr_fast.random_patches(), arguments.iters, model=model)
        if on_gpu:
            torch.cuda.synchronize()

    refine()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        refine()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(times.values())
    ticks = arguments.iters * model.refine_schedule.steps(max(1, model.grid.num_patches // 4))
    run = f"{arguments.boards} boards, {arguments.iters} iterations on {arguments.device}"
    print(f"{run}: {total / 1e3 / ticks:.2f} ms a tick")
    for kind, time in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {kind:24} {100 * time / total:5.1f} %")
    if arguments.trace is not None:
        profiler.export_chrome_trace(arguments.trace)
        print(f"wrote {arguments.trace}")


if __name__ == "__main__":
    main()
