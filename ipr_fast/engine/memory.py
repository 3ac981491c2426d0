"""How many chains fit: bytes are counted on a few lanes, before the others are made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipr_fast.engine.capture_check import without_compile

FEW_BYTES = 2**28  # not worth a look at what is free
SHARE = 0.85  # of the free memory; the rest is for workspaces of libraries and what fragments


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive at a time; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key not in given and key not in self._seen:
                self._seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided)


class Need(NamedTuple):
    """The bytes that lanes take: fixed + lanes * each, and never fewer than are taken for a while to make them."""

    fixed: int
    each: int
    making: int = 0

    def of(self, lanes: int) -> int:
        return max(self.making, self.fixed + lanes * self.each)

    def lanes_within(self, available: float) -> int:
        if available == float("inf"):
            return sys.maxsize
        if available < self.making:
            return 0
        return max(0, int((available - self.fixed) // max(1, self.each)))


class Peaks(NamedTuple):
    """The most bytes at a time while lanes are made, and while they run."""

    made: int
    run: int


def count(make: Callable[[int], Any], run: Callable[[Any], object], device: torch.device, graphs: bool = False) -> Need:
    """The bytes of `make(lanes)`, which makes so many lanes, and of `run` on them, once: from one lane and three.

    What making them takes for a while is the same for any number of lanes (tables), so the line is through what runs
    take: else the tables would hide what the first lane takes, and the line be too flat.
    graphs: what is taken for a while is then counted twice, once for the pool of graphs captured before, and once for
    the next one's warm-up.
    """
    if device.type == "cuda":
        with without_compile():
            run(make(1))  # compiles kernels and makes the libraries' handles
    one, three = (_bytes(make, run, lanes, device, 2 if graphs else 1) for lanes in (1, 3))
    fits = [_line(first.run, then.run) for first, then in zip(one, three, strict=True)]
    each = max(need.each for need in fits)
    making = max(peaks.made for peaks in one)
    return Need(max(max(0, need.of(1) - each) for need in fits), each, making)


def _line(one: int, three: int) -> Need:
    """The need of which these are the bytes for one lane and for three."""
    each = max(0, three - one) // 2
    return Need(max(0, one - each), each)


def _bytes(
    make: Callable[[int], Any], run: Callable[[Any], object], lanes: int, device: torch.device, times: int
) -> list[Peaks]:
    """The peaks as counted and, on a GPU, as its allocator says, which sees libraries' workspaces."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with without_compile(), PeakBytes() as counted:
        made = make(lanes)
        first = _peaks(counted, device, before)
        counted.peak = counted.now
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run(made)
        lasting = counted.now
        then = _peaks(counted, device, before)
        del made
    return [Peaks(a, lasting + times * max(0, b - lasting)) for a, b in zip(first, then, strict=True)]


def _peaks(counted: PeakBytes, device: torch.device, before: int) -> list[int]:
    own = [torch.cuda.max_memory_allocated(device) - before] if device.type == "cuda" else []
    return [counted.peak, *own]


def available_bytes(device: torch.device) -> float:
    """What is free on a device; infinite where nobody knows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the pools of graphs are reserved, but nobody else's to have
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:
                return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return float("inf")
    return float("inf")


def check_samples(name: str, count: int, numel: int, device: torch.device) -> None:
    """Raise ValueError where so many samples of `numel` float32 numbers, and a copy that is worked on, do not fit."""
    needed = 2 * 4 * count * numel
    if needed < FEW_BYTES:
        return
    there = available_bytes(device)
    if needed > there:
        raise ValueError(
            f"{name}: {count} samples take at least {binary(needed)} on {device}, which has {binary(there)} left; make "
            "fewer at a time, with chain_ids= that go on counting"
        )


def total_bytes(device: torch.device) -> float:
    """What a GPU has; infinite elsewhere."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")


def binary(size: float) -> str:
    """Bytes for a message."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
