"""CUDA graphs: a function is captured once, then replayed without Python.

The function takes no arguments and works on buffers that keep their addresses. `capture_check` names an operation that
a graph cannot hold before the capture fails for it.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar, Protocol

import torch

from ipr_fast.engine.capture_check import CaptureError, Watch, failed_capture, without_compile


class Capture(Protocol):
    """Makes graphs: CudaCapture on a GPU, a recorder of operations in tests."""

    def __call__(self, name: str, function: Callable[[], object]) -> Callable[[], None]:
        """Capture the function and return its replay.

        It runs twice before, which compiles kernels and allocates what lasts. Raises CaptureError, with `name`, if it
        cannot be captured. Whatever is raised, no capture is left under way.
        """

    def start_over(self) -> None:
        """Forget the memory pool: all graphs made so far have been dropped."""


class CudaCapture:
    """Captures on one device. Its graphs share a memory pool, since none of them returns a tensor."""

    _one_at_a_time = threading.RLock()
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        self.start_over()

    def start_over(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, name: str, function: Callable[[], object]) -> Callable[[], None]:
        with self._one_at_a_time, torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream), _no_autocast_cache():
                    with without_compile(), Watch(name, self.device):
                        function()
                    function()  # as it will be captured
                    self.stream.synchronize()
                    torch.cuda.empty_cache()  # the capture allocates again what the warm-up did
                    return self._capture(name, function)
            finally:  # after an error too, work on the stream may still write to the buffers
                outside.wait_stream(self.stream)

    def _capture(self, name: str, function: Callable[[], object]) -> Callable[[], None]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # destroying an old graph during the capture would spoil it
        try:
            try:
                with torch.inference_mode(False):  # the generator's tensors, made here, also serve other code
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
        finally:
            if collects:
                gc.enable()
        return graph.replay

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


class Graphs(OrderedDict[Hashable, Callable[[], None]]):
    """Replays of captured functions by key; beyond `most`, the least recently used one is dropped."""

    def __init__(self, capture: Capture, most: int = 128) -> None:
        super().__init__()
        self.capture, self.most = capture, most

    def use(self, key: Hashable) -> bool:
        """Return whether there is a graph for this key, which then counts as used."""
        if key in self:
            self.move_to_end(key)
        return key in self

    def add(self, key: Hashable, name: str, function: Callable[[], object]) -> None:
        """Capture a function under a key."""
        replay = self.capture(name, function)
        if len(self) >= self.most:
            self.popitem(last=False)
        self[key] = replay

    def clear(self) -> None:
        super().clear()
        self.capture.start_over()
