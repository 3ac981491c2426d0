"""The parts of torch.cuda that captures use, on the CPU: streams, graphs, memory pools, workspaces of cuBLAS."""

from __future__ import annotations

import itertools
import threading
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

REGULAR = "memory outside of graphs"


class FakeCuda:
    """Keeps torch's books: a workspace for each stream, allocated in the pool of the capture that first needs it.

    frees: destroying a graph frees the workspaces of its stream, as torch 2.12 and newer does.
    `spoiled` lists calls made while a capture was open that would have spoiled it; `graphs` all graphs alive.
    """

    def __init__(self, monkeypatch, frees: bool = True) -> None:
        self.frees, self.spoiled, self.workspaces, self.numbers = frees, [], {}, itertools.count()
        self.graphs, self._thread, self._open = weakref.WeakSet(), threading.local(), []
        self._default = FakeStream(-1)
        for name, value in {
            "Stream": lambda device=None: FakeStream(next(self.numbers) % 32),
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": lambda: ("pool", next(self.numbers)),
            "current_stream": lambda device=None: self.current,
            "current_blas_handle": self.product,
            "stream": self.on,
            "device": nullcontext,
            "empty_cache": lambda: self._spoils("empty_cache"),
            "synchronize": lambda device=None: self._spoils("synchronize"),
            "mem_get_info": lambda device=None: (2**30, 2**31),
            "is_available": lambda: True,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("mm", "addmm"):
            monkeypatch.setattr(torch, name, self.product)

    @property
    def current(self) -> FakeStream:
        return getattr(self._thread, "stream", self._default)

    @contextmanager
    def on(self, stream):
        before, self._thread.stream = self.current, stream
        yield
        self._thread.stream = before

    def product(self, *_) -> None:
        """Use the workspace of the current stream, as a matrix product does."""
        graph = next((graph for graph in self._open if graph.stream == self.current), None)
        pool = REGULAR if graph is None else graph.pool()
        workspace = self.workspaces.setdefault(self.current, SimpleNamespace(pool=pool))
        if graph is not None:
            graph.holds.append(workspace)

    def clear_workspaces(self) -> None:
        """Free all of them, as torch.compile(mode="reduce-overhead") does."""
        self.workspaces.clear()

    def holds_freed_memory(self, graph: FakeGraph) -> bool:
        """Whether the memory of a workspace in the graph may be another's: it is freed, and its pool has ended."""
        pools, kept = {other.pool() for other in self.graphs}, list(self.workspaces.values())
        return any(workspace not in kept and workspace.pool not in pools for workspace in graph.holds)

    def _spoils(self, name: str) -> None:
        if self._open:
            self.spoiled.append(name)


class FakeStream:
    """A stream; two of the same number are the same one."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other) -> bool:
        return self.number == other.number

    def __hash__(self) -> int:
        return self.number

    def wait_stream(self, other) -> None: ...

    def synchronize(self) -> None: ...


class FakeGraph:
    """A graph: its stream, and the workspaces that its products hold."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.stream, self.holds, self._pool = cuda, None, [], None

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        self.stream, self._pool = self.cuda.current, pool or ("own", next(self.cuda.numbers))
        self.cuda._open.append(self)

    def capture_end(self) -> None:
        self.cuda._open.remove(self)
        self.cuda.graphs.add(self)

    def pool(self):
        return self._pool

    def replay(self) -> None: ...

    def __del__(self) -> None:
        if self.cuda.frees:
            self.cuda.workspaces.pop(self.stream, None)
