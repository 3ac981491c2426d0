"""What a result needs to be understood later: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device | None = None, commit: str | None = None) -> dict[str, object]:
    """Machine, versions and commit, ready for JSON; of a GPU (by default where there is one), what it is and does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    described = {
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


def version(package: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them; nothing where there is none."""
    names = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[:1]
    return dict(zip(names, (value.strip() for value in values[0].split(",")), strict=False)) if values else {}


def write(results: dict, path: Path | None) -> None:
    """Write a measurement as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(results, indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: where the disk is full, what was there stays."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def current_commit() -> str:
    """The commit of the working tree, with a plus sign where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
