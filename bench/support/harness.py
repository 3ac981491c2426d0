"""What measurements share: a time budget, timing that ends in a synchronisation, the most memory, bench/'s options."""

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

FEWEST_ROUNDS = 3  # of which a median is reported
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
        """A clock that ends after a share of what is left."""
        return Clock(share * self.left(), self.now)


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def device_argument(text: str) -> torch.device:
    """For argparse: a device on which tensors can be made."""
    try:
        return usable_device("device", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device_of(config: pytest.Config) -> torch.device:
    """Where to measure, by bench/'s option."""
    device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def sizes_of(config: pytest.Config) -> str:
    """Which sizes, by bench/'s option: "full" for a GPU, "small" for two cores, "smoke" to try the benchmarks."""
    return config.getoption("--sizes") or ("full" if device_of(config).type == "cuda" else "small")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """The times of each function in each round, one after the other, each first in its turn.

    Fewer rounds than `rounds`, but at least FEWEST_ROUNDS, where the clock runs out.
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
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a device that an error has spoiled: whoever uses it next will say so
            torch.cuda.empty_cache()


def most_bytes(work: Callable[[], Made], device: torch.device) -> tuple[int, Made]:
    """The most bytes of tensors at a time that a first call of `work` makes beside those there are; and its result.

    As counted on a CPU, as asked of the allocator on a GPU: what it gives depends on the blocks it has at hand.
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
