"""How many chains fit: bytes are counted on a few lanes, before the others are made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipr_fast.watch import without_compile

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
    """The bytes that lanes take: fixed + lanes * each."""

    fixed: int
    each: int

    def of(self, lanes: int) -> int:
        return self.fixed + lanes * self.each

    def lanes_within(self, available: float) -> int:
        if available == float("inf"):
            return sys.maxsize
        return max(0, int((available - self.fixed) // max(1, self.each)))


def count(work: Callable[[int], object], device: torch.device, graphs: bool = False) -> Need:
    """The bytes of `work(lanes)`, which makes so many lanes, runs them once and returns them: from one lane and three.

    graphs: what is taken for a while is then counted twice, once for the pool of graphs captured before, and once for
    the next one's warm-up.
    """
    if device.type == "cuda":
        with without_compile():
            work(1)  # compiles kernels and makes the libraries' handles
    times = 2 if graphs else 1
    fits = [_line(*peaks) for peaks in zip(*(_bytes(work, lanes, device, times) for lanes in (1, 3)), strict=True)]
    each = max(need.each for need in fits)
    return Need(max(max(0, need.of(1) - each) for need in fits), each)


def _line(one: int, three: int) -> Need:
    """The need of which these are the bytes for one lane and for three."""
    each = max(0, three - one) // 2
    return Need(max(0, one - each), each)


def _bytes(work: Callable[[int], object], lanes: int, device: torch.device, times: int) -> list[int]:
    """The most bytes at a time, as counted and, on a GPU, as its allocator says, which sees libraries' workspaces."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with without_compile(), PeakBytes() as counted:
        made = work(lanes)
        lasting = counted.now
        del made
    peaks = [counted.peak]
    if device.type == "cuda":
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return [lasting + times * max(0, peak - lasting) for peak in peaks]


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
