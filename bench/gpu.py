"""Run all checks and benchmarks that need a GPU.

    python bench/gpu.py [--minutes 20] [--out FILE.json]    on a CUDA device; default bench/results/bench-DEVICE.json
    python bench/gpu.py --only bench                        or --only checks: one of the two
    python bench/gpu.py --smoke                             tiny models, without a GPU too, to try this script itself

Runs `pytest -m gpu`, then `pytest bench`, each in a process that is killed when it takes too long. Benchmarks that no
longer fit into the time are skipped; failed ones have no figure. Compiled kernels are kept in .caches/. The outcome of
the checks is written as `checks` in `machine_info`. The status is 1 if anything failed. Needs the package installed, or
PYTHONPATH at the repository's root.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from support.harness import Clock, say

from ipr_fast.outputs import prepare_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
CHECKS, BENCH = "checks", "bench"
MINUTES = 20.0  # all benchmarks; some 120 s of checks in WORKERS processes on an H100, where kernels are compiled
CHECKS_SHARE = 0.4  # of the time, at most
WORKERS = 7  # processes of checks, where pytest-xdist is installed: most of their time is compilation
CACHES = {  # of compiled kernels: kept for the next phase, and the next run
    "TRITON_CACHE_DIR": ROOT / ".caches" / "triton",
    "TORCHINDUCTOR_CACHE_DIR": ROOT / ".caches" / "inductor",
}
GRACE = 60.0  # seconds beyond their time for benchmarks to finish and write JSON
# pyproject.toml has -q; with another, pytest would omit its last line.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs")


class Outcome(NamedTuple):
    """The end of a process: whether it passed, and its last line or how it died."""

    passed: bool
    summary: str


def run(command: Sequence[str], limit: float) -> Outcome:
    """Run a command at the repository's root, showing its output; kill it after `limit` seconds."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    caches = {name: str(folder) for name, folder in CACHES.items()}
    killed, last = threading.Event(), "no output"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=caches | os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # to kill its children too, such as torch.compile's workers
    ) as process:

        def kill() -> None:
            killed.set()
            with suppress(ProcessLookupError):  # already ended
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, kill)
        timer.start()
        try:
            for line in process.stdout:
                say(line.rstrip("\n"))
                last = line.strip() or last
            status = process.wait()
        except KeyboardInterrupt:
            kill()
            raise
        finally:
            timer.cancel()
    if killed.is_set():
        return Outcome(False, f"killed after {limit:.0f} s; its last line: {last}")
    if status < 0:
        return Outcome(False, f"ended by signal {-status}; its last line: {last}")
    return Outcome(status == 0, last)


def check(limit: float) -> Outcome:
    """Run the tests that need a GPU."""
    command = [*PYTEST, "-m", "gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    return run(command, limit)


def measure(clock: Clock, sizes: str, commit: str | None) -> tuple[Outcome, dict | None]:
    """Run the benchmarks; return the outcome and pytest-benchmark's JSON, None if it did not get to write it."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "bench.json")
        options = ["--sizes", sizes, "--minutes", f"{clock.left() / 60:.3f}", "--benchmark-json", str(written)]
        options += [] if commit is None else ["--commit", commit]
        outcome = run([*PYTEST, "bench", *options], clock.left() + GRACE)
        text = written.read_text() if written.exists() else ""
    return outcome, json.loads(text) if text else None


def default_path(figures: dict, smoke: bool) -> Path:
    """Return bench/results/bench-DEVICE.json; for a smoke run, a file in a temporary folder."""
    if smoke:
        return Path(tempfile.mkdtemp(prefix="ipr-fast-")) / "gpu-smoke.json"
    name = figures["machine_info"]["device"].lower().removeprefix("nvidia")
    return ROOT / "bench" / "results" / f"bench-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for both together (default {MINUTES:.0f})")
    parser.add_argument("--only", choices=(CHECKS, BENCH))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="a .json file (default bench/results/bench-DEVICE.json)")
    parser.add_argument("--commit", help="the measured commit, for a copy of the files without history")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.minutes < float("inf"):
        parser.error(f"--minutes must be a number, at least 0, got {arguments.minutes}")
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --smoke runs without")
    if arguments.smoke and arguments.only == CHECKS:
        parser.error("--smoke has no checks: they need a GPU")
    clock, outcomes = Clock(60 * arguments.minutes), {}
    if arguments.smoke:
        say("a trial with tiny models, whose figures mean nothing; without pytest -m gpu")
    elif arguments.only != BENCH:
        outcomes[CHECKS] = check(clock.left() * (1 if arguments.only == CHECKS else CHECKS_SHARE))
    if arguments.only != CHECKS:
        outcomes[BENCH], figures = measure(clock, "smoke" if arguments.smoke else "full", arguments.commit)
        if figures is None:
            say("no figures: they are written when all benchmarks are done")
        else:
            figures["machine_info"] |= {name: outcome._asdict() for name, outcome in outcomes.items()}
            out = arguments.out or default_path(figures, arguments.smoke)
            prepare_folder(out.parent)
            write_json(out, figures)
            say(f"wrote {out}")
    for name, outcome in outcomes.items():
        say(f"{'passed' if outcome.passed else 'FAILED'} {name}: {outcome.summary}")
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
