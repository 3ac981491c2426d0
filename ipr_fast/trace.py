"""Named ranges around the engine's work, for Nsight Systems (NVTX) or torch's profiler.

Outside `tracing` a range costs a tenth of a microsecond. A graph's replay is one range, in which only kernels show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

try:
    import nvtx
except ImportError:  # no wheels for macOS, and nothing to profile there
    nvtx = None

_OFF: AbstractContextManager = nullcontext()
_makers: list[Callable[[str], AbstractContextManager]] = []


def span(name: str) -> AbstractContextManager:
    """Return a named range to enter around a block of host code."""
    return _makers[-1](name) if _makers else _OFF


@contextmanager
def tracing(kind: str | Callable[[str], AbstractContextManager] = "nvtx") -> Iterator[None]:
    """Turn ranges on within this block, in all threads.

    kind: "nvtx" for Nsight Systems and Nsight Compute, in the domain ipr_fast; "torch" for torch.profiler; or a
    function that returns the range of a name. Raises ValueError for another kind, ImportError if the package nvtx is
    not installed.
    """
    if not callable(kind) and kind not in ("nvtx", "torch"):
        raise ValueError(f'kind must be "nvtx" or "torch", got {kind!r}')
    if kind == "nvtx" and nvtx is None:
        raise ImportError('ranges of NVTX need the package nvtx; tracing("torch") does not')
    make = kind if callable(kind) else _nvtx_range if kind == "nvtx" else _torch_range
    _makers.append(make)
    try:
        yield
    finally:
        _makers.remove(make)


def _nvtx_range(name: str) -> AbstractContextManager:
    return nvtx.annotate(name, domain="ipr_fast")


def _torch_range(name: str) -> AbstractContextManager:
    return torch.profiler.record_function(f"ipr_fast::{name}")
