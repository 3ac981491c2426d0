"""Work captured once as a CUDA graph, then replayed.

What is captured is a function without arguments over buffers that stay where they are. A replay repeats its operations
on what the buffers then hold; no Python runs. `Watch` finds what a graph cannot hold before a capture fails for it.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import ClassVar, Protocol

import torch

from ipr_fast.engine.capture_check import CaptureError, Watch, failed_capture, without_compile


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
        try:
            graph.capture_end()
        except Exception:  # a warning that is an error, too: an empty graph warns
            self._recover()
        self.start_over()  # a pool whose last graph is gone is no pool any more

    def _recover(self) -> None:
        """Undo what torch leaves of a capture that was spoiled: its hold on the allocator, and on the generator."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
        end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        with suppress(RuntimeError, TypeError):
            end(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        self.start_over()
        with suppress(Exception), torch.inference_mode(False):
            graph = torch.cuda.CUDAGraph()  # a capture that ends well resets the generator
            graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            graph.capture_end()


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
