"""Made-up measurements in the format of `pytest bench --benchmark-json`, and a reader of Markdown tables."""

from __future__ import annotations

import json
from pathlib import Path

MACHINE = {
    "commit": "0123456789ab",
    "python": "3.11.9",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "device": "A Processor",
    "processor": "A Processor",
    "cores": 2,
    "threads": 1,
}
GPU = {"device": "A GPU", "cuda": "13.0", "nvidia-smi": {"driver_version": "600.1"}}


def benchmark(
    name: str, group: str, seconds: list[float], *, against: dict[str, list[float]] | None = None, **facts: object
) -> dict:
    """Return one benchmark; `against` maps a baseline to its seconds for the same number of units."""
    units = facts.pop("units", 1.0)
    arms = {
        each: {"units": units, "seconds": times, "first_call": 2 * times[0]} for each, times in (against or {}).items()
    }
    always = {
        "device": "cpu",
        "unit": "chain-iterations",
        "units": units,
        "check": {"against": "reference", "difference": 1e-6, "tolerance": 1e-4},
        "first_call": 10 * seconds[0],
        "against": arms,
        "dtype": "float32",
    }
    return {"name": name, "group": group, "stats": {"data": seconds}, "extra_info": always | facts}


def write(path: Path, benchmarks: list[dict], **machine: object) -> Path:
    path.write_text(json.dumps({"machine_info": MACHINE | machine, "benchmarks": benchmarks}))
    return path


def operations(device: str = "cpu") -> list[dict]:
    """Return a memory-bound operation at half a copy's rate and a compute-bound one at a quarter of a product's."""
    copy, product = ([0.001, 0.0011, 0.0012] for _ in range(2))
    memory = {"unit": "bytes", "units": 8e6, "bytes": 8e6, "flops": 4e6, "batch": 64, "device": device}
    compute = memory | {"unit": "flop", "units": 4e9, "flops": 4e9}
    halved, quartered = [2 * time for time in copy], [4 * time for time in product]
    against = {"matrix product": product, "torch": [8 * time for time in product]}
    return [
        benchmark(
            "test_renoise[9x9]", "operations", halved, against={"copy": copy}, subject="renoise", shape="9x9", **memory
        ),
        benchmark(
            "test_attention[9x9]", "operations", quartered, against=against, subject="attention", shape="9x9", **compute
        ),
    ]


def sweeps(device: str = "cpu", faster: float = 1.0) -> list[dict]:
    """Return end-to-end sweeps: over batches up to 4,096, at 1 ms plus 10 us per chain, and over iterations."""
    common = {"subject": "4x4 transformer", "ratio": 0.25, "steps": 16, "device": device}
    batches = [
        benchmark(
            f"test_batches[{batch}]",
            "end to end",
            [noise * (1e-3 + 1e-5 * batch) / faster for noise in (0.98, 1.0, 1.03)],
            units=float(batch),
            batch=batch,
            iters=1,
            sweep="batch",
            peak_bytes=2**20 + 9000 * batch,
            **common,
        )
        for batch in (1, 4, 16, 64, 256, 1024, 4096)
    ]
    iterations = [
        benchmark(
            f"test_iterations[{iters}]",
            "end to end",
            [1e-3 * iters / faster] * 3,
            units=64.0 * iters,
            batch=64,
            iters=iters,
            sweep="iters",
            peak_bytes=2**20 + 9000 * 64,
            **common,
        )
        for iters in (1, 2, 5, 10)
    ]
    return batches + iterations


def step(device: str = "cpu", **facts: object) -> dict:
    """Return a tick that spends nine tenths of its time in the network."""
    facts = {"unit": "ticks", "subject": "Even Pixels", "batch": 64, "outside_share": [0.08, 0.1, 0.12]} | facts
    return benchmark("test_outside", "step", [0.01] * 3, against={"network": [0.009] * 3}, device=device, **facts)


def baselines(device: str = "cpu", **facts: object) -> dict:
    """Return Even Pixels, five times as fast as one at a time and twice as fast as a batched loop."""
    facts = {"subject": "Even Pixels", "batch": 8, "steps": 4, "own_steps": 75, "units": 8.0} | facts
    against = {"one at a time": [5.0, 5.2, 4.9, 5.0], "batched": [2.0] * 4}
    return benchmark("test_baselines[8]", "baselines", [1.0] * 4, against=against, device=device, **facts)


def row(text: str, *begin: str) -> list[str]:
    """Return the non-empty cells of the only row of a Markdown table that begins with these."""
    start = f"| {' | '.join(begin)} |"
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|") if cell.strip()]
