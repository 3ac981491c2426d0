"""Named ranges around the engine's work: for Nsight Systems (NVTX), or for torch's profiler.

Off, which they are unless `tracing` is entered, a range costs a tenth of a microsecond. A graph's replay is one range:
what is in it shows as kernels only, by their names.
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
    """A named range around a block of host code."""
    return _makers[-1](name) if _makers else _OFF


@contextmanager
def tracing(kind: str = "nvtx") -> Iterator[None]:
    """Ranges are on within this block, of all threads.

    kind: "nvtx" for Nsight Systems and Nsight Compute, in the domain ipr_fast; "torch" for torch.profiler. Raises
    ValueError for another kind, ImportError where the package nvtx is not installed.
    """
    if kind not in ("nvtx", "torch"):
        raise ValueError(f'kind must be "nvtx" or "torch", got {kind!r}')
    if kind == "nvtx" and nvtx is None:
        raise ImportError('ranges of NVTX need the package nvtx; tracing("torch") does without')
    make = _nvtx_range if kind == "nvtx" else _torch_range
    _makers.append(make)
    try:
        yield
    finally:
        _makers.remove(make)


def _nvtx_range(name: str) -> AbstractContextManager:
    return nvtx.annotate(name, domain="ipr_fast")


def _torch_range(name: str) -> AbstractContextManager:
    return torch.profiler.record_function(f"ipr_fast::{name}")
