"""Streams for captures, with the memory that cuBLAS works in on them, and the lock that keeps captures whole.

torch keeps a workspace for each cuBLAS handle and stream, and a captured product holds its address. Torch 2.12 and
newer frees the workspaces of a stream when any graph captured on it is destroyed (pytorch issue 193402), and in every
version `torch.compile(mode="reduce-overhead")` frees the workspaces of all streams. So each set of graphs has a stream
of its own, and its workspaces lie in memory pools that live at least as long as the set: a workspace that is freed
returns to its pool, which serves nothing but captures on that stream.
"""

from __future__ import annotations

import threading
import weakref
from typing import ClassVar

import torch
from torch.torch_version import TorchVersion

STREAMS = 32  # that torch makes for a device before it hands them out again
FREED_WITH_GRAPHS = TorchVersion(torch.__version__) >= "2.12"  # workspaces, when a graph of their stream is destroyed

# Held during a capture, and by a thread that synchronises the device or empties the allocator's cache: on any thread,
# both spoil a capture under way.
capture_lock = threading.RLock()


def empty_cache() -> None:
    """Return the allocator's free memory to the current device, when no thread captures."""
    with capture_lock:
        torch.cuda.empty_cache()


class _Stream:
    """A stream for the sets of graphs that follow one another on it."""

    def __init__(self, device: torch.device, others: list[_Stream]) -> None:
        taken, self.device = {other.stream for other in others}, device
        streams = (torch.cuda.Stream(device) for _ in range(STREAMS))
        unused = (stream for stream in streams if stream not in taken)
        self.stream: torch.cuda.Stream = next(unused, None) or torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None  # whose pool holds the workspaces, before torch 2.12

    def own_workspaces(self) -> None:
        """Have the next capture hold no workspace but in its own pool, or in one that lasts as long as this stream.

        Torch 2.12 and newer: the end of a graph frees the workspaces that torch keeps for the stream, and the capture
        allocates others in its own pool. Older versions never free those of a single stream, so a set would hold
        workspaces in the pool of an earlier one: they are allocated here, in a pool that lasts.
        """
        torch.cuda.current_blas_handle()  # made here if the thread has none: a capture could not
        graph, pool = torch.cuda.CUDAGraph(), None if self._graph is None else self._graph.pool()
        with torch.cuda.stream(self.stream), torch.inference_mode(False):
            graph.capture_begin(pool, "thread_local")
            try:
                square = torch.zeros(16, 16, device=self.device)
                if not FREED_WITH_GRAPHS:
                    torch.mm(square, square)
                    torch.addmm(square[0], square, square)  # by cuBLASLt, whose workspace may be another
            finally:
                graph.capture_end()
        if not FREED_WITH_GRAPHS:
            self._graph = graph


class CaptureStream:
    """A stream for one set of graphs, which keep this object; afterwards another set may take the stream.

    Beyond STREAMS living sets on a device, two of them share a stream.
    """

    _all: ClassVar[dict[torch.device, list[_Stream]]] = {}
    _idle: ClassVar[dict[torch.device, list[_Stream]]] = {}

    def __init__(self, device: torch.device) -> None:
        with capture_lock:
            streams, idle = self._all.setdefault(device, []), self._idle.setdefault(device, [])
            if not idle:
                streams.append(_Stream(device, streams))
                idle.append(streams[-1])
            self._own = idle.pop()
        weakref.finalize(self, idle.append, self._own)

    @property
    def stream(self) -> torch.cuda.Stream:
        return self._own.stream

    def own_workspaces(self) -> None:
        """Have cuBLAS's workspaces of the next capture lie where nothing frees them while graphs of this set live."""
        self._own.own_workspaces()
