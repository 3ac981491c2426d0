"""CUDA graphs: a function is captured once, then replayed without Python.

The function takes no arguments and works on buffers that keep their addresses. `capture_check` names an operation that
a graph cannot hold before the capture fails for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

import torch

from ipr_fast.engine.capture_check import CaptureError, Watch, failed_capture, without_compile
from ipr_fast.engine.capture_stream import CaptureStream, capture_lock

Key = TypeVar("Key", bound=Hashable)


class Capture(Protocol):
    """Makes graphs: CudaCapture on a GPU, a recorder of operations in tests."""

    def __call__(self, name: str, function: Callable[[], object]) -> Callable[[], None]:
        """Capture the function and return its replay.

        The function first runs twice, to compile kernels and allocate persistent buffers. Raises CaptureError, with
        `name`, if it cannot be captured. Whatever is raised, no capture is left under way.
        """

    def start_over(self) -> None:
        """Forget the memory pool: all graphs made so far have been dropped."""


class CudaCapture:
    """Captures one set of graphs on one device. They share a memory pool, since none of them returns a tensor."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, CaptureStream(device)
        self.start_over()

    def start_over(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, name: str, function: Callable[[], object]) -> Callable[[], None]:
        with capture_lock, torch.cuda.device(self.device), _no_autocast_cache():
            with without_compile(), Watch(name, self.device):
                function()
            function()  # warm up the compiled path; not on the stream, whose workspaces must come from the pools
            torch.cuda.current_stream().synchronize()
            with _no_garbage_collection():
                self.stream.own_workspaces()
                torch.cuda.empty_cache()  # the capture allocates again what the warm-up did
                with torch.cuda.stream(self.stream.stream):
                    return partial(_replay, self._capture(name, function), self.stream)

    def _capture(self, name: str, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(False):  # allocates the generator's tensors, also used outside inference mode
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            function()
        except BaseException as error:
            self._abandon(graph)
            if not isinstance(error, RuntimeError) or isinstance(error, (CaptureError, torch.OutOfMemoryError)):
                raise
            raise failed_capture(name, error) from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            self._recover()
            raise failed_capture(name, error) from error
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture after an error."""
        try:
            graph.capture_end()
        except Exception:  # also the warning of an empty graph, where warnings are errors
            self._recover()
        self.start_over()  # a pool ends with its last graph

    def _recover(self) -> None:
        """Release what torch keeps of a capture that could not be ended: the allocator's pool and the generator."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # newer and older torch
        ends = [getattr(torch._C, name) for name in names if hasattr(torch._C, name)]
        with suppress(RuntimeError, TypeError, IndexError):
            ends[0](self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        self.start_over()
        with suppress(Exception), torch.inference_mode(False):
            graph = torch.cuda.CUDAGraph()  # a capture that succeeds resets the generator
            graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            graph.capture_end()


def _replay(graph: torch.cuda.CUDAGraph, stream: CaptureStream) -> None:
    """Replay a graph on the current stream; the stream that it was captured on stays its own meanwhile."""
    graph.replay()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from destroying an old graph, which would spoil a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Let autocast cast weights inside the graph: a cast cached before may be freed before the graph is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Graphs(dict[Hashable, Callable[[], None]]):
    """Replays of captured functions by key; they are dropped all together, since they share stream and memory.

    most: graphs that are kept at a time.
    """

    def __init__(self, capture: Capture, most: int = 128) -> None:
        super().__init__()
        self.capture, self.most = capture, most

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys without a graph: all of them, after dropping the others, if `most` would be exceeded."""
        wanted = dict.fromkeys(keys)
        if len(self.keys() | wanted.keys()) > self.most:
            self.clear()
        return [key for key in wanted if key not in self]

    def add(self, key: Hashable, name: str, function: Callable[[], object]) -> None:
        """Capture a function under a key."""
        self[key] = self.capture(name, function)

    def clear(self) -> None:
        super().clear()
        self.capture.start_over()
