"""What a CUDA graph cannot hold, found where it happens.

A graph's replay runs no Python: nothing captured may look at the data from the host, and no shape may depend on data.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

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
    "item",
    "argwhere",
    "one_hot",
    "allclose",
}  # make the host wait for the device, or a shape depend on data; so does indexing by a bool mask
HOST_COPIES = {"_to_copy", "to", "copy_", "_copy_from", "where"}
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
            by_data = operation == "repeat_interleave" and func.__name__.endswith("Tensor")
            if operation in HOST_OPERATIONS or by_data or (operation == "where" and len(args) == 1):
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
        return cannot_capture(self.name, f"{func}{_where(frames)}: {why}")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


_alone = threading.RLock()


@contextmanager
def without_compile() -> Iterator[None]:
    """Within, functions of torch.compile run as written. First called under a mode, they would never compile at all.

    That is a switch of the whole process, so one thread is within at a time.
    """
    with _alone, torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first of these frames and lines, innermost first, that is outside torch and this package's own capturing."""
    here = os.path.dirname(__file__)
    own = (os.path.dirname(torch.__file__), __file__, os.path.join(here, "graphs.py"))
    for frame, line in frames:
        if not frame.f_code.co_filename.startswith(own):
            return f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{line})"
    return ""


def cannot_capture(name: str, why: str) -> CaptureError:
    return CaptureError(
        f'{name} cannot be captured as a CUDA graph: {why}. Change that, or pass backend="torch", which runs without '
        f"graphs."
    )


def failed_capture(name: str, error: RuntimeError) -> CaptureError:
    """The error for a capture that failed, with the line where."""
    frames = list(traceback.walk_tb(error.__traceback__))
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return cannot_capture(name, f"{reason}{_where(reversed(frames))}")
