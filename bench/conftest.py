"""Options, fixtures and final summary of `pytest bench`.

    pytest bench                                  on a CPU, sizes for two cores; on a GPU, full ones
    pytest bench --benchmark-json FILE.json       and write the figures down, for bench/report.py
    pytest bench --benchmark-disable              only the checks: every benchmark against the reference

A benchmark is a test of a file bench_*.py that uses the fixture `measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import report
import torch
from support.harness import Clock, device_of, free_memory, sizes_of
from support.measure import Measure

from ipr_fast.checks import usable_device
from ipr_fast.engine import graph_cache
from ipr_fast.engine.precision import float32_products
from ipr_fast.evaluation import environment

RECORDS = pytest.StashKey[list]()
INTERRUPTED: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ipr_fast")
    group.addoption("--device", help="where to measure (default: cuda where there is one, else cpu)")
    group.addoption("--sizes", choices=("smoke", "small", "full"), help="default: full on a GPU, else small")
    group.addoption("--minutes", type=float, help="skip benchmarks that no longer fit into this time")
    group.addoption("--budget", type=float, help="time each benchmark for at most so many seconds")
    group.addoption("--commit", help="the measured commit, for a copy of the files without history")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")  # of torch.compile itself
    if config.option.verbose <= 0:
        config.option.benchmark_quiet = True  # the final summary has the ratios
    for name in ("minutes", "budget"):
        value = getattr(config.option, name)
        if value is not None and not 0 <= value < float("inf"):
            raise pytest.UsageError(f"--{name} must be a number, at least 0, got {value}")
    if config.option.device is not None:
        try:
            usable_device("--device", config.option.device)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    """ "smoke", "small" or "full"."""
    return sizes_of(request.config)


@pytest.fixture
def keep_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep graphs of any size: the short calls here stand for long ones, so none may capture again."""
    monkeypatch.setattr(graph_cache, "KEPT_SHARE", 1.0)


@pytest.fixture(scope="session")
def clock(request: pytest.FixtureRequest) -> Clock:
    minutes = request.config.getoption("--minutes")
    return Clock(float("inf") if minutes is None else 60 * minutes)


@pytest.fixture
def measure(benchmark: object, device: torch.device, clock: Clock, request: pytest.FixtureRequest) -> Iterator[Measure]:
    with float32_products(device, tf32=False):
        yield Measure(benchmark, device, clock, request.config.stash[RECORDS], request.config.getoption("--budget"))
    graph_cache.drop_kept()
    free_memory(device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Record machine and versions, without the host's name."""
    machine_info.clear()
    machine_info.update(environment.describe(commit=config.getoption("--commit")) | {"sizes": sizes_of(config)})


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo) -> None:
    INTERRUPTED.append(excinfo.typename)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Mark a file as incomplete if a benchmark failed or the run was stopped."""
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    wrong = [f"{len(stats[name])} {name}" for name in ("failed", "error") if stats.get(name)]
    summary = ", ".join(wrong + INTERRUPTED) or "all passed"
    output_json["machine_info"]["bench"] = {"passed": not wrong, "stopped": bool(INTERRUPTED), "summary": summary}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Drop it: the environment has the commit."""
    commit_info.clear()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if records:
        terminalreporter.write_sep("=", "ratios")
        terminalreporter.write_line(report.summary(records))
