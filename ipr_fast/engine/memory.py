"""How many lanes fit into memory: the bytes of a few lanes are counted, before the others are allocated."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ipr_fast.engine.capture_check import tensors_in, without_compile
from ipr_fast.engine.capture_stream import empty_cache

SHARE = 0.85  # of the free memory; the rest is for fragmentation
FEW = (1, 3)  # lanes that are counted
MANY = 64  # and on a GPU these, if they fit: with few, libraries choose algorithms that take small workspaces or none

Made = TypeVar("Made")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were made inside: current (`now`) and maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key not in inputs and key not in self._counted:
                self._counted.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int, num_bytes: int) -> None:
        self._counted.discard(key)
        self.now -= num_bytes


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tensors_in(tree) if tensor.layout == torch.strided)


class Need(NamedTuple):
    """The bytes of n lanes: fixed + n * each, but at least `making`, the peak while they are allocated."""

    fixed: int
    each: int
    making: int = 0

    def of(self, num_lanes: int) -> int:
        return max(self.making, self.fixed + num_lanes * self.each)

    def lanes_within(self, available: float) -> int:
        """Return how many lanes fit into `available` bytes."""
        if available == float("inf"):
            return sys.maxsize
        if available < self.making:
            return 0
        return max(0, int((available - self.fixed) // max(1, self.each)))


def count(
    make: Callable[[int], Made],
    run: Callable[[Made], object],
    device: torch.device,
    graphs: bool = False,
    most: int = MANY,
) -> Need:
    """Count the bytes of `make(num_lanes)` and `run(lanes)`, for a few lanes and, on a GPU, for up to MANY.

    Fits bytes = fixed + n * each to the peaks of running. Peaks of allocating are excluded: they hold tables whose size
    does not depend on n. On a GPU there are two fits, of counted tensors and of the allocator, which sees libraries'
    workspaces; the need is at least either one.
    graphs: count temporary tensors twice, for the memory pool of captured graphs and for the next one's warm-up.
    most: lanes that are wanted. No more are counted, nor more than a quarter of a GPU's free memory holds by the lanes
    counted before; after one that does not fit at all, those before it decide.

    On a GPU this resets torch's statistics of the largest allocation.
    """
    on_gpu, times = device.type == "cuda", 2 if graphs else 1
    if on_gpu:
        with without_compile():
            run(make(1))  # compiles kernels and makes the libraries' handles
    making, at_one = _peaks(make, run, FEW[0], device, times)
    peaks = {FEW[0]: at_one}
    try:
        if most > FEW[0]:
            few = min(FEW[1], most)
            peaks[few] = _peaks(make, run, few, device, times)[1]
        if on_gpu:
            fitting = _fit(peaks, max(making)).lanes_within(available_bytes(device) / 4)
            many = min(most, MANY, fitting)
            if many > FEW[1]:
                peaks[many] = _peaks(make, run, many, device, times)[1]
    except torch.OutOfMemoryError:
        pass
    return _fit(peaks, max(making))


def _fit(peaks: Mapping[int, Sequence[int]], making: int) -> Need:
    """Return the least need that no kind of bytes exceeds, with its steepest slope. peaks: of each kind, by lanes."""
    lanes = list(peaks)
    slopes = [
        max(0, more - few) // (n - k) for k, n in pairwise(lanes) for few, more in zip(peaks[k], peaks[n], strict=True)
    ]
    each = max(slopes) if slopes else max(peaks[lanes[0]])
    return Need(max(0, *(max(peak) - n * each for n, peak in peaks.items())), each, making)


def _peaks(
    make: Callable[[int], Made], run: Callable[[Made], object], num_lanes: int, device: torch.device, times: int
) -> tuple[list[int], list[int]]:
    """Return the most bytes while lanes are allocated and while they run: as counted, and on a GPU as allocated."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0

    def reset() -> None:
        counted.peak = counted.now
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)

    def read() -> list[int]:
        return [counted.peak, *([torch.cuda.max_memory_allocated(device) - before] if on_gpu else [])]

    with without_compile(), PeakBytes() as counted:
        reset()
        made = make(num_lanes)
        making = read()
        reset()
        run(made)
        lasting, running = counted.now, read()
        del made
    return making, [lasting + times * max(0, peak - lasting) for peak in running]


def available_bytes(device: torch.device) -> float:
    """Return the free bytes of a device; infinity if they are unknown."""
    if device.type == "cuda":
        empty_cache()
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
    """Return the bytes of a GPU's memory; infinity elsewhere."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")


def binary(num_bytes: float) -> str:
    """Format a number of bytes for a message."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
