"""Profile a refinement in its steady state: where does the time of a tick go?

    python profiling/profile_refine.py                           a table, by torch's profiler, on any machine
    python profiling/profile_refine.py --chrome trace.json.gz    and the trace (ui.perfetto.dev or chrome://tracing)
    python profiling/profile_refine.py --nvtx --device cuda      to be run by nsys.sh and ncu.sh

The first calls warm up: graphs are captured, kernels compiled. The call after them is recorded, with the same ranges
everywhere: those of ipr_fast.trace. With --nvtx it lies between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from support import subjects
from support.device_trace import UNTIL_DONE, record
from support.harness import seconds
from support.script import at_least
from where_time_goes import ATTENTION, BETWEEN, PRODUCTS, Split, split

import ipr_fast
from ipr_fast.checks import usable_device
from ipr_fast.evaluation import environment
from ipr_fast.outputs import replacing
from ipr_fast.trace import tracing

CALL = "steady state"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=subjects.makers(smoke=False), default="4x4 transformer")
    parser.add_argument("--chains", type=at_least(1), default=512)
    parser.add_argument("--iters", type=at_least(1), default=3, help="iterations of the call that is recorded")
    parser.add_argument(
        "--steps", type=at_least(0), default=0, help="shorten an iteration to so many; 0: the model's own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backend", choices=("auto", "graphs", "torch"), default="auto", help="torch: without graphs")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chrome", type=Path, metavar="FILE", help="keep the trace: .json or .json.gz")
    how.add_argument("--nvtx", action="store_true", help="for Nsight: ranges of NVTX, no table")
    return parser


def workload(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[], object], int]:
    """Return the call to record, and the steps of its iterations."""
    model = subjects.makers(smoke=False)[options.model]().to(device=device, dtype=DTYPES[options.dtype])
    x, active = subjects.samples(model, options.chains, device), subjects.num_active(model)
    own = model.refine_schedule
    schedule = subjects.shortened(own, active, options.steps) if options.steps > 0 else own
    policy, how = ipr_fast.random_patches(subjects.RATIO), {"schedule": schedule, "backend": options.backend}

    def refine() -> None:
        ipr_fast.refine_batch(x, policy, options.iters, model=model, **how)

    return refine, schedule.steps(active)


def for_nsight(refine: Callable[[], object], device: torch.device) -> None:
    """Run one call with NVTX ranges, on a GPU between cudaProfilerStart and cudaProfilerStop."""
    on_gpu = device.type == "cuda"
    with torch.cuda.profiler.profile() if on_gpu else nullcontext(), tracing("nvtx"):
        seconds(refine, device)
    print("cudaProfilerStart, one call, cudaProfilerStop" if on_gpu else "one call; a CPU has no cudaProfilerStart")


def report(found: Split, alone: float, profiled: float, on_gpu: bool) -> str:
    """Format the table by range and by kind; alone, profiled: seconds of the call without and with the profiler."""
    ticks, share = found.ticks, 100 / found.total
    lines = [
        f"one call: {1e3 * alone:.1f} ms, {1e3 * alone / ticks:.2f} ms a tick ({ticks} ticks)",
        f"under the profiler: {1e3 * profiled:.1f} ms, {profiled / alone:.2f} times as long",
    ]
    if on_gpu:
        busy = found.total / (1e6 * profiled)
        lines.append(f"the device works in {100 * busy:.1f} % of that, and the table is of this time")

    def table(title: str, rows: list[tuple[str, float]], entered: bool) -> None:
        lines.extend(["", f"{title:44} {'ms a tick':>9} {'%':>6}" + (f" {'a tick':>7}" if entered else "")])
        for name, time in rows:
            times = f" {found.entered[name] / ticks:7.2f}" if entered and found.entered[name] else ""
            lines.append(f"  {name[:42]:42} {time / 1e3 / ticks:9.3f} {time * share:6.1f}{times}")

    whole = ("all", found.total)
    table("by range, without what is inside", [*found.by_range(), whole], entered=True)
    table("by kind of operator", [*found.by_kind(), whole], entered=False)
    table("the longest of them", found.longest(8), entered=False)
    lines += [f"  not classified: {name[:80]}, {time * share:.1f} %" for name, time in found.unclassified()]
    heavy = found.of(PRODUCTS, ATTENTION)
    lines.append("")
    if profiled < alone:
        lines.append("Other work has kept this machine busy: the call took longer without the profiler. Run it again.")
    elif not on_gpu:
        lines.append(f"""The profiler takes its time with each operator, so small ones, and {BETWEEN!r}, look
larger than they are: of the call's time without it the next line's share would be {heavy / (1e4 * alone):.0f} %.""")
    lines.append(f"matrix products, convolutions and attention: {heavy * share:.0f} % of the engine's time")
    return "\n".join(lines)


def write_trace(events: list[dict], path: Path) -> None:
    data = json.dumps({"traceEvents": events}).encode()
    with replacing(path) as file:
        file.write(gzip.compress(data) if path.suffix == ".gz" else data)


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        device = usable_device("--device", options.device)
    except ValueError as error:
        parser.error(str(error))
    on_gpu = device.type == "cuda"
    if options.backend == "graphs" and not on_gpu:
        parser.error(f"--backend graphs needs a CUDA device, got {device}")
    if options.chrome is not None and (options.chrome.is_dir() or not options.chrome.parent.is_dir()):
        parser.error(f"--chrome must name a file in a folder that is there, got {options.chrome}")
    refine, steps = workload(options, device)
    facts = environment.describe(device)
    print(f"{options.model}, {options.chains:,} chains, {options.iters} x {steps} steps, {options.dtype}, ", end="")
    print(f"backend {options.backend}, on {facts['device']}; torch {facts['torch']}, ", end="")
    print(f"threads: {facts['threads']}, commit {facts['commit']}", flush=True)
    refine()
    alone = statistics.median(seconds(refine, device) for _ in range(3))
    if options.nvtx:
        for_nsight(refine, device)
        return
    with tracing("torch"):
        events = record({CALL: refine}, device)
    profiled = next(event["dur"] for event in events if event.get("name") == CALL + UNTIL_DONE) / 1e6
    print(report(split(events, CALL + UNTIL_DONE, on_gpu), alone, profiled, on_gpu))
    if options.chrome is not None:
        write_trace(events, options.chrome)
        print(f"wrote {options.chrome}")


if __name__ == "__main__":
    main()
