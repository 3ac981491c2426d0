"""Finds operations that a CUDA graph cannot hold, and names the line of the model that calls them.

A replay runs no Python, so a captured function must not read data from the host, and no shape may depend on data.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that make the host wait for the device, or a shape depend on data; so does indexing by a bool mask.
# fmt: off
HOST_OPERATIONS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "bincount", "masked_select", "unique_consecutive", "unique_dim", "_unique", "_unique2", "one_hot",
}
# fmt: on
HOST_COPIES = {"_to_copy", "to", "copy_", "_copy_from", "where"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class CaptureError(RuntimeError):
    """A model, or another function, cannot be captured as a CUDA graph; the message names the operation."""


class Watch(TorchDispatchMode):
    """Raises CaptureError at an operation of the function `name` that a graph cannot hold.

    device: whose operations are checked; default: all devices.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.name, self.device = name, device

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        operation, inputs = func.__name__.split(".")[0], tensors_in((args, kwargs))
        if any(self._is_checked(tensor) for tensor in inputs):
            by_data = operation == "repeat_interleave" and func.__name__.endswith("Tensor")
            if operation in HOST_OPERATIONS or by_data or (operation == "where" and len(args) == 1):
                raise self._error(func, "it makes the host wait for the device, or a shape depend on data")
            if operation in INDEXING:
                self._check_indices(func, args[0], args[1], args[2:])
        out = func(*args, **kwargs)
        outputs = tensors_in(out)
        if operation in HOST_COPIES and len({tensor.device.type for tensor in (*inputs, *outputs)}) > 1:
            raise self._error(func, "it copies between host and device")
        if operation == "lift_fresh" and self.device is not None and any(map(self._is_checked, outputs)):
            raise self._error(func, "it copies Python's numbers from the host")
        return out

    def _is_checked(self, tensor: Tensor) -> bool:
        return self.device is None or tensor.device.type == self.device.type

    def _check_indices(
        self, func: OpOverload, tensor: Tensor, indices: Sequence[Tensor | None], values: Sequence[Tensor]
    ) -> None:
        used = [index for index in indices if index is not None]
        if any(index.device != tensor.device for index in used):
            raise self._error(func, "its indices are copied from the host")
        fills = "put" in func.__name__ and values and values[0].numel() == 1 and values[0].device.type == "cpu"
        if any(index.dtype in (torch.bool, torch.uint8) for index in used) and not (fills and self.device):
            raise self._error(func, "indexing by a bool mask makes a shape depend on data")

    def _error(self, func: OpOverload, why: str) -> CaptureError:
        return _cannot_capture(self.name, f"{func}{_place(traceback.walk_stack(sys._getframe()))}: {why}")


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


_one_at_a_time = threading.RLock()


@contextmanager
def without_compile() -> Iterator[None]:
    """Run functions of torch.compile uncompiled, so that a dispatch mode sees their operations.

    A function whose first call is made under a dispatch mode would never be compiled afterwards. This switch is the
    whole process's, so it admits one thread at a time.
    """
    with _one_at_a_time, torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return " in function (file:line)" of the innermost frame outside torch, this file and graphs.py."""
    skipped = (os.path.dirname(torch.__file__), __file__, os.path.join(os.path.dirname(__file__), "graphs.py"))
    for frame, line in frames:
        if not frame.f_code.co_filename.startswith(skipped):
            return f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{line})"
    return ""


def _cannot_capture(name: str, why: str) -> CaptureError:
    advice = 'Change that, or pass backend="torch", which runs without graphs.'
    return CaptureError(f"{name} cannot be captured as a CUDA graph: {why}. {advice}")


def failed_capture(name: str, error: RuntimeError) -> CaptureError:
    """Return the error for a capture that failed with `error`, with the line that raised it."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return _cannot_capture(name, f"{reason}{_place(reversed(list(traceback.walk_tb(error.__traceback__))))}")
