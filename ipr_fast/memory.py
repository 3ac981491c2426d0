"""How many chains fit: bytes are counted on a few lanes, before the others are made."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Need(NamedTuple):
    """The bytes that lanes take: fixed + lanes * each."""

    fixed: int
    each: int

    def lanes_within(self, available: float) -> int:
        return max(0, int((available - self.fixed) // max(1, self.each)))


def count(work: Callable[[int], object]) -> Need:
    """The bytes of `work(lanes)`, which makes so many lanes and runs them once, from one lane and from three."""
    peaks = []
    for lanes in (1, 3):
        with PeakBytes() as counted:
            work(lanes)
        peaks.append(counted.peak)
    each = max(0, peaks[1] - peaks[0]) // 2
    return Need(max(0, peaks[0] - each), each)


def available_bytes(device: torch.device) -> float:
    """What is free on a device; infinite where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:
                return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return float("inf")
    return float("inf")


def binary(size: float) -> str:
    """Bytes for a message."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
