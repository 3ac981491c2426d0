"""The environment of a measurement: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

FILE = Path(__file__)


def describe(device: torch.device | None = None, commit: str | None = None) -> dict[str, object]:
    """Return machine, versions and commit, ready for JSON; for a GPU (default if present) its properties too.

    commit: overrides the commit of the working tree, for a copy without history.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    described: dict[str, object] = {
        "commit": current_commit() if commit is None else commit,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy", "scikit-learn")},
        "device": processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type != "cuda":
        return described
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "device": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia-smi": nvidia_smi(),
    }


def measured_at(environment: dict) -> str:
    """Return the sentence that names a measurement's commit and machine, from what `describe` returned."""
    return (
        f"Measured at {environment['commit']} on {environment['device']}, torch {environment['torch']}, "
        f"threads: {environment['threads']}."
    )


def version(package: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str]:
    """Return driver, clocks, power and temperature from nvidia-smi; empty where it cannot run."""
    names = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[:1]
    return dict(zip(names, (value.strip() for value in values[0].split(",")), strict=False)) if values else {}


def current_commit() -> str:
    """Return the commit of the package's working tree, with "+" where tracked files differ; "unknown" without one.

    An installed copy inside a working tree of something else is in none.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=FILE.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", FILE.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Return the processor's name from the operating system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
