"""Work captured once as a CUDA graph, then replayed.

What is captured is a function without arguments over buffers that stay where they are. A replay repeats its operations
on what the buffers then hold; no Python runs. So nothing in it may look at the data from the host, and no shape may
depend on data. `Watch` finds what does, before a capture fails for it.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
HOST_COPIES = {"_to_copy", "copy_", "_copy_from", "where"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class CaptureError(RuntimeError):
    """A model, or another function, cannot be captured in a CUDA graph; says which operation is why."""


class Watch(TorchDispatchMode):
    """Raises a CaptureError at an operation of the function `name` that a graph cannot hold.

    device: whose operations these are; by default any. What the host does with tensors of its own is its own business.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.name, self.device = name, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation, given = func.__name__.split(".")[0], _tensors((args, kwargs))
        if any(self._is_there(tensor) for tensor in given):
            if operation in HOST_OPERATIONS or (operation == "repeat_interleave" and func.__name__.endswith("Tensor")):
                raise self._error(func, "it makes the host wait for the device, or a shape depend on data")
            if operation in INDEXING:
                self._check_indices(func, operation, *args, **kwargs)
        out = func(*args, **kwargs)
        devices = {tensor.device.type for tensor in (*given, *_tensors(out))}
        if operation in HOST_COPIES and len(devices) > 1:
            raise self._error(func, "it copies between host and device")
        if operation == "lift_fresh" and self.device is not None and self._is_there(out):
            raise self._error(func, "a tensor made of Python's numbers is copied from the host")
        return out

    def _is_there(self, tensor: Tensor) -> bool:
        return self.device is None or tensor.device.type == self.device.type

    def _check_indices(self, func: object, operation: str, tensor: Tensor, indices: list, *rest, **_) -> None:
        indices = [index for index in indices if index is not None]
        if any(index.device != tensor.device for index in indices):
            raise self._error(func, "its indices are copied from the host")
        fills = operation != "index" and rest and rest[0].numel() == 1 and rest[0].device.type == "cpu"
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not (fills and self.device):
            raise self._error(func, "indexing by a bool mask makes a shape depend on data")

    def _error(self, func: object, why: str) -> CaptureError:
        frames = [(frame, frame.f_lineno) for frame in _callers(sys._getframe(1))]
        return _cannot(self.name, f"{func}{_where(frames)}: {why}")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def without_compile() -> Iterator[None]:
    """Within, functions of torch.compile run as written. First called under a mode, they would never compile at all.

    That is a switch of the whole process, so one thread is within at a time.
    """
    with _alone, torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


_alone = threading.RLock()


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


class Capture(Protocol):
    """Makes graphs."""

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        """Run the function twice, to compile kernels and make what lasts, then capture it; returns its replay.

        Raises CaptureError where it cannot be, and leaves no capture under way whatever happens.
        """

    def start_over(self) -> None:
        """All graphs made so far are gone."""


class CudaCapture:
    """Captures on one device, in one memory pool that all its graphs share: none leaves a tensor in it."""

    _one_at_a_time = threading.RLock()
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        self.start_over()

    def start_over(self) -> None:
        """See `Capture`."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        with self._one_at_a_time, torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream), _no_autocast_cache():
                    with without_compile(), Watch(name, self.device):
                        function()
                    function()  # as it will be captured
                    self.stream.synchronize()
                    torch.cuda.empty_cache()  # what the warm-up took, the capture takes again
                    return self._capture(name, function)
            finally:  # what was queued before an error still writes to the buffers
                outside.wait_stream(self.stream)

    def _capture(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # the end of an old graph within the capture would spoil it
        try:
            try:
                with torch.inference_mode(False):  # the generator's own tensors, made here, serve others as well
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                function()
            except BaseException as error:
                self._abandon(graph)
                if not isinstance(error, RuntimeError) or isinstance(error, (CaptureError, torch.OutOfMemoryError)):
                    raise
                raise _failed(name, error) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._recover()
                raise _failed(name, error) from error
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._recover()

    def _recover(self) -> None:
        """Undo what torch leaves of a capture that was spoiled: its hold on the allocator, and on the generator."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
        release = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        with suppress(RuntimeError, TypeError):
            release(self.device.index, self.pool)
        self.start_over()
        with suppress(RuntimeError), torch.inference_mode(False):
            graph = torch.cuda.CUDAGraph()  # a capture that ends well resets the generator
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            graph.capture_end()


def _failed(name: str, error: RuntimeError) -> CaptureError:
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
            self._replays.popitem(last=False)
        self._replays[key] = replay

    def clear(self) -> None:
        """Drop all."""
        self._replays.clear()
        self.capture.start_over()

    def replay(self, key: Hashable) -> None:
        self._replays[key]()
