"""What the parts of a measurement share: a time budget, timing that ends in a synchronisation, records of failure."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

FEWEST_ROUNDS = 3  # of which a median is reported


class Clock:
    """A time budget in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.start = now, now()
        self.end = self.start + seconds

    def left(self) -> float:
        return self.end - self.now()

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left()

    def within(self, seconds: float) -> Clock:
        """A clock that ends in so many seconds, or with this one."""
        return Clock(min(seconds, self.left()), self.now)

    def share(self, share: float) -> Clock:
        """A clock that ends after a share of what is left."""
        return Clock(share * self.left(), self.now)


@dataclass
class Run:
    """One part under way: where, on what clock, and where its results go.

    results is filled as the part goes on and written by `save` in between, so that a crash loses little.
    """

    device: torch.device
    clock: Clock
    smoke: bool = False
    results: dict = field(default_factory=dict)
    save: Callable[[], None] = lambda: None

    def skip(self, name: str, why: str) -> None:
        """Say that something was left out."""
        self.results.setdefault("skipped", []).append(f"{name}: {why}")
        say(f"skipped {name}: {why}")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Work whose failure is recorded under its name, and keeps nothing else from running."""
        say(f"{name} ({self.clock.left():.0f} s left)")
        free_memory(self.device)
        try:
            yield
        except Exception as error:
            self.results.setdefault("failed", {})[name] = describe_error(error)
            say(f"FAILED {name}: {describe_error(error)['message']}")
        self.save()


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def describe_error(error: BaseException) -> dict[str, str]:
    """An exception for JSON: its message in a line or two, and where it was raised."""
    where = "".join(traceback.format_tb(error.__traceback__)[-4:])
    return {"message": f"{type(error).__name__}: {str(error)[:500]}", "where": where}


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


def reset_peak(device: torch.device) -> int:
    """Begin to look for the most memory; returns the bytes that are allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device, before: int = 0) -> dict[str, int]:
    """The most bytes allocated, beside those there were before, and reserved since `reset_peak`; none on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(device) - before,
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }
