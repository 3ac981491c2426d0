"""Timing that ends in a synchronisation, peak memory, a time budget, and the options of `pytest bench`."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import torch

from ipr_fast.checks import usable_device
from ipr_fast.engine import graph_cache
from ipr_fast.engine.memory import PeakBytes

if TYPE_CHECKING:
    import pytest

FEWEST_ROUNDS = 3  # for a median
Made = TypeVar("Made")


class Clock:
    """A time budget in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.start = now, now()
        self.end = self.start + seconds

    def left(self) -> float:
        return self.end - self.now()

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left()

    def share(self, share: float) -> Clock:
        """Return a clock that ends after a share of the time left."""
        return Clock(share * self.left(), self.now)


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)


def device_argument(text: str) -> torch.device:
    """Parse a usable device, for argparse."""
    try:
        return usable_device("device", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device_of(config: pytest.Config) -> torch.device:
    """Return the device to measure, from the option --device."""
    device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def sizes_of(config: pytest.Config) -> str:
    """Return the sizes, from --sizes: "full" for a GPU, "small" for two cores, "smoke" to try the benchmarks."""
    return config.getoption("--sizes") or ("full" if device_of(config).type == "cuda" else "small")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Time the functions in interleaved rounds that rotate their order; return each one's seconds by round.

    When the clock runs out there are fewer rounds, but at least FEWEST_ROUNDS.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        if i >= FEWEST_ROUNDS and not clock.fits(sum(map(statistics.median, times.values()))):
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(functions[name], device))
    return times


def quartiles(values: list[float]) -> list[float]:
    """Return first quartile, median, third quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def free_memory(device: torch.device) -> None:
    """Free the memory of unreachable tensors."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after a CUDA error; its next user will raise it
            torch.cuda.empty_cache()


def most_bytes(work: Callable[[], Made], device: torch.device) -> tuple[int, Made]:
    """Return the peak bytes of tensors that a first call of `work` adds, and its result.

    Counted on a CPU; on a GPU, the bytes requested from the allocator, as those reserved depend on its free blocks.
    """
    graph_cache.drop_kept()
    free_memory(device)
    if device.type != "cuda":
        with PeakBytes() as counted:
            made = work()
        return counted.peak, made
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    made = work()
    synchronize(device)
    return torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before, made
