"""All checks and measurements that need a GPU, in one go.

    python bench/gpu.py [--minutes 8] [--out FILE.json]     on a CUDA device; writes FILE.json and FILE.md
    python bench/gpu.py --only throughput engine            some of the parts: checks, kernels, throughput, engine
    python bench/gpu.py --smoke [--device cuda]             every part with tiny models, to try this script itself
    python bench/gpu.py --report FILE.json                  print an earlier measurement

Each part has a share of the time, and leaves out, and says so, what no longer fits. What fails is recorded and the rest
goes on; the status is 1 if anything has failed. Results are written as they come, so a crash leaves those before it.
It needs the package installed, or PYTHONPATH at the root of the repository.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import engine_costs
import environment
import gpu_report
import throughput
import torch
from harness import Clock, Run, say

import kernels

ROOT = environment.ROOT
# Quiet already by pyproject.toml; quieter still, pytest would leave out its last line.
CHECKS = (sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "-p", "no:cacheprovider")


def checks(run: Run, command: Sequence[str] = CHECKS) -> None:
    """The tests that need a GPU, in a process of their own."""
    if run.smoke:
        run.skip("pytest -m gpu", "this is only a trial of the script")
        return
    limit = run.clock.left()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, status = (error.stdout or b"") + f"\nnot done after {limit:.0f} s".encode(), None
    lines = output.decode(errors="replace").strip().splitlines()
    say("\n".join(lines[-5:]))
    summary = lines[-1] if lines else "no output"
    run.results |= {"passed": status == 0, "status": status, "summary": summary, "output": lines[-80:]}


def kernel_times(run: Run) -> None:
    """Each Triton kernel against its twin and against the device's bandwidth."""
    measured = kernels.measure(8 if run.smoke else 4096, run.device)
    run.results |= {name: value for name, value in measured.items() if name != "environment"}


# The work of each part, and its share of the time, by weight: what one leaves over, the next ones have.
PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "checks": (checks, 5),
    "kernels": (kernel_times, 1),
    "throughput": (throughput.measure, 4),
    "engine": (engine_costs.measure, 2),
}


def measure(
    names: Sequence[str], device: torch.device, minutes: float, smoke: bool, out: Path, commit: str | None = None
) -> dict:
    """Run these parts; returns what is written to `out`."""
    clock, start = Clock(60 * minutes), time.monotonic()
    described = machine(device) | ({} if commit is None else {"commit": commit})
    results: dict = {"environment": described, "smoke": smoke, "minutes": minutes, "parts": {}}

    def save() -> None:
        results["seconds"] = time.monotonic() - start
        environment.write(results, out)

    for i, name in enumerate(names):
        work, weight = PARTS[name]
        whole = sum(PARTS[each][1] for each in names[i:])
        part = Run(device, clock.share(weight / whole), smoke, results["parts"].setdefault(name, {}), save)
        if clock.left() <= 0:
            part.skip(name, "no time left")
        else:
            say(f"== {name}, {part.clock.left():.0f} s")
            begin = time.monotonic()
            with part.attempt(name):
                work(part)
            part.results["seconds"] = time.monotonic() - begin
    results["environment"]["after"] = nvidia_smi(device)
    save()
    out.with_suffix(".md").write_text(gpu_report.report(results) + "\n")
    return results


def failures(results: dict) -> list[str]:
    """What is wrong: checks that did not pass, and work that raised."""
    found = []
    for name, part in results["parts"].items():
        found += [f"{name}: {what}: {why['message']}" for what, why in part.get("failed", {}).items()]
        if part.get("passed") is False:
            found.append(f"{name}: the checks did not pass")
    return found


def machine(device: torch.device) -> dict[str, object]:
    """Machine, versions and commit."""
    described = environment.describe() | {"processor": environment.processor(), "cores": os.cpu_count()}
    try:
        described["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        described["triton"] = None
    if device.type != "cuda":
        return described | {"device": environment.processor()}
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "device": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "before": nvidia_smi(device),
    }


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them; nothing where there is none."""
    if device.type != "cuda":
        return {}
    names = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[:1]
    return dict(zip(names, (value.strip() for value in values[0].split(",")), strict=False)) if values else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="a budget for all parts together (default 8)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--device", help="default: cuda; with --smoke, cpu")
    parser.add_argument("--out", type=Path, help="a .json file (default bench/results/gpu-DEVICE.json)")
    parser.add_argument("--commit", help="what is measured, where these files are a copy without their history")
    parser.add_argument("--report", type=Path, help="print this file, measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        print(gpu_report.report(json.loads(arguments.report.read_text())))
        return 0
    device = torch.device(arguments.device or ("cpu" if arguments.smoke else "cuda"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("needs a CUDA device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    elif not arguments.smoke:
        parser.error("needs a CUDA device; --smoke runs on others")
    out = arguments.out or _default_out(device, arguments.smoke)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in arguments.only]
    results = measure(names, device, arguments.minutes, arguments.smoke, out, arguments.commit)
    print(gpu_report.report(results))
    for line in failures(results):
        print(f"FAILED {line}")
    print(f"wrote {out} and {out.with_suffix('.md')}")
    return 1 if failures(results) else 0


def _default_out(device: torch.device, smoke: bool) -> Path:
    if smoke:
        return Path(tempfile.mkdtemp(prefix="ipr-fast-")) / "gpu-smoke.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")
    return ROOT / "bench" / "results" / f"gpu-{name}.json"


if __name__ == "__main__":
    sys.exit(main())
