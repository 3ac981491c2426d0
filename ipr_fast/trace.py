"""NVTX ranges, for Nsight Systems. A range costs about a microsecond when no profiler listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    import nvtx
except ImportError:  # no wheels for macOS, and nothing to profile there
    nvtx = None


def span(name: str) -> AbstractContextManager:
    """A named range around a block of host code."""
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain="ipr_fast")
