"""Work captured once as a CUDA graph, then replayed.

What is captured is a function without arguments over buffers that stay where they are. A replay repeats its operations
on what the buffers then hold; no Python runs. So nothing in it may look at the data from the host, and no shape may
depend on data. `Watch` finds what does, before a capture fails for it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from types import FrameType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Capture = Callable[[str, Callable[[], None]], Callable[[], None]]

HOST_OPERATIONS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
}  # make the host wait for the device, or a shape depend on data; so does indexing by a bool mask
HOST_COPIES = {"_to_copy", "copy_", "_copy_from"}


class CaptureError(RuntimeError):
    """A model, or another function, cannot be captured in a CUDA graph; says which operation is why."""


class Watch(TorchDispatchMode):
    """Raises a CaptureError at an operation of the function `name` that a graph cannot hold."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func.__name__.split(".")[0]
        if operation in HOST_OPERATIONS or (operation == "repeat_interleave" and func.__name__.endswith("Tensor")):
            raise self._error(func, "it makes the host wait for the device, or a shape depend on data")
        if operation in ("index", "index_put", "index_put_") and any(_is_mask(i) for i in args[1]):
            raise self._error(func, "indexing by a bool mask makes a shape depend on data")
        out = func(*args, **(kwargs or {}))
        if operation in HOST_COPIES:
            devices = {t.device.type for t in (*tree_leaves((args, kwargs)), out) if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise self._error(func, "it copies between host and device")
        return out

    def _error(self, func: object, why: str) -> CaptureError:
        frames = [(frame, frame.f_lineno) for frame in _callers(sys._getframe(1))]
        return _cannot(self.name, f"{func}{_where(frames)}: {why}")


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first of these frames and lines, innermost first, that is outside torch and this file."""
    own = (os.path.dirname(torch.__file__), __file__)
    for frame, line in frames:
        if not frame.f_code.co_filename.startswith(own):
            return f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{line})"
    return ""


def _cannot(name: str, why: str) -> CaptureError:
    return CaptureError(
        f'{name} cannot be captured as a CUDA graph: {why}. Change that, or pass backend="torch", which runs without '
        f"graphs."
    )


class CudaCapture:
    """Captures functions on one device, in one memory pool that all the graphs share: none keeps a tensor in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        """Run the function twice, to compile kernels and make what lasts, then capture it; returns its replay.

        Raises CaptureError where it cannot be, and leaves no capture under way whatever happens.
        """
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), _no_autocast_cache():
                with Watch(name):
                    function()
                function()  # as it will be captured: a mode changes how torch.compile's functions run
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what the warm-up took, the capture takes again
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    function()
                except BaseException as error:
                    with suppress(RuntimeError):  # of a capture that the error has spoiled
                        graph.capture_end()
                    raise _failed(name, error) from error
                try:
                    graph.capture_end()
                except RuntimeError as error:
                    raise _failed(name, error) from error
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


def _failed(name: str, error: BaseException) -> BaseException:
    """What to raise for an error that came up in a capture."""
    if not isinstance(error, RuntimeError) or isinstance(error, (CaptureError, torch.OutOfMemoryError)):
        return error
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return _cannot(name, f"{reason}{_where(reversed(frames))}")


class _no_autocast_cache:
    """Autocast must cast weights inside a graph: what it has cached before may be gone when the graph is replayed."""

    def __enter__(self) -> None:
        self.before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_cache_enabled(self.before)


class Graphs:
    """Captured functions by key; beyond `most` of them the one not used for longest is dropped."""

    def __init__(self, capture: Capture, most: int = 128) -> None:
        self.capture, self.most = capture, most
        self._replays: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    def touch(self, key: Hashable) -> bool:
        """Whether there is a graph for this key; it then counts as used."""
        if key in self._replays:
            self._replays.move_to_end(key)
        return key in self._replays

    def __len__(self) -> int:
        return len(self._replays)

    def add(self, key: Hashable, name: str, function: Callable[[], None]) -> None:
        """Capture a function under a key. What the capture raises leaves things as they were."""
        replay = self.capture(name, function)
        if len(self._replays) >= self.most:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # it may still be running
            self._replays.popitem(last=False)
        self._replays[key] = replay

    def clear(self) -> None:
        """Drop all."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # one may still be running
        self._replays.clear()

    def replay(self, key: Hashable) -> None:
        self._replays[key]()
