"""What a piece of work does, counted and not timed: operators, looks at the data, floating-point operations, bytes.

Counted is what PyTorch dispatches: with the torch twins, as a CPU runs them, or with Triton kernels, as a GPU would,
though none is launched. On tensors without data (device "meta") that takes neither memory nor arithmetic, and is the
same on every machine.

On a CPU the engine runs packed weights (ipr_fast/models/packed.py) where torch is built with oneDNN; tensors without
data take the plain layers, whose operators and bytes are others.

Operators: one that is made of others counts as those, except for linear layers, attention, GroupNorm and resampling,
which every backend does in one go. Views are free, and so is memory that is only reserved. A launch is one operator.
FLOPs: those of matrix products, convolutions and attention, as torch's flop counter has them; no others. So a sum or
GELU in which a packed layer ends adds none.
Bytes: of the tensors that an operator reads and writes, each once, and of what an index picks, not of all that it
picks from. So a cache may save some of them.
Allocations: tensors with memory of their own; not the workspaces of libraries, nor the padding of packed weights, which
differs between machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ipr_fast.engine.capture_check import CaptureError, Watch
from support.launches import is_packed, launches_to, size_of, tensors_of

WHOLE = {"group_norm", "linear", "scaled_dot_product_attention", "upsample_bilinear2d", "upsample_nearest2d"}
RESERVES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # what was there is not read
PICKS = {"embedding", "gather", "index", "index_select"}  # of the first tensor, as much as comes out
PUTS = {"index_copy_", "index_put_", "scatter_"}  # into the first tensor, as much as the last one holds
LAID_OUT = {"convolution", "group_norm", "scaled_dot_product_attention"}  # contiguous, where there is no data
FLOPS = {
    "linear": lambda out, x, weight, bias=None: 2 * x.numel() * weight.shape[0],
    "scaled_dot_product_attention": lambda out, q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    "mkldnn::_linear_pointwise": lambda out, x, weight, *_: 2 * x.numel() * weight.shape[0],
    "mkldnn::_convolution_pointwise": lambda out, *given: 2 * out.numel() * _terms(*given),
    "mkldnn::_convolution_pointwise_": lambda out, *given: 2 * out.numel() * _terms(*given),
}  # where torch's flop counter looks at what they are made of, or does not know them


class Operation(NamedTuple):
    """One call of an operator, or one launch of a kernel."""

    name: str
    flops: int
    bytes: int


@dataclass
class Counts:
    """What a piece of work did; allocated: in bytes. given: the storages that operators were given, by address."""

    operations: list[Operation] = field(default_factory=list)
    host_syncs: int = 0
    allocations: int = 0
    allocated: int = 0
    given: set[int] = field(default_factory=set)

    def add(self, name: str, flops: int, moved: int, given: list[Tensor]) -> None:
        """One more operation on the tensors given."""
        self.operations.append(Operation(name, flops, moved))
        self.given |= _storages(given)

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operations)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.operations)

    @property
    def by_name(self) -> Counter[str]:
        """How often each operator was called."""
        return Counter(each.name for each in self.operations)


def count(work: Callable[[], object], device: torch.device | str, *, kernels: bool = False) -> Counts:
    """What `work` does with tensors of a device; what the host does with its own, beside a GPU, is its own business.

    kernels: with Triton kernels, which write nothing here: for tensors without data. Raises RuntimeError where there is
    no Triton, or its interpreter.
    """
    counts = Counts()
    with (
        torch.inference_mode(),
        launches_to(counts.add) if kernels else nullcontext(),
        _Counting(counts, torch.device(device)),
    ):
        work()
    return counts


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, device: torch.device) -> None:
        super().__init__()
        self.counts, self.device = counts, device
        # On a CPU only looks at the data count: there, a tensor made of Python's numbers is copied from nowhere.
        self.watch = Watch("the work", None if device.type == "cpu" else device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name not in WHOLE:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given, out = tensors_of((args, kwargs)), self._run(func, name, types, args, kwargs)
        made = _made(given, out)
        if any(tensor.device.type == self.device.type for tensor in (*given, *made)):
            self.counts.allocations += len(made)
            self.counts.allocated += sum(map(_allocated, made))
            if name not in RESERVES and (made or func._schema.is_mutable or not tensors_of(out)):
                moved = _bytes_moved(func, name, args, kwargs, made)
                self.counts.add(name, _flops(func, name, args, kwargs, out), moved, given)
        return out

    def _run(self, func: Any, name: str, types: Any, args: tuple, kwargs: dict) -> object:
        try:
            out = self.watch.__torch_dispatch__(func, types, args, kwargs)
        except CaptureError:  # copies are found once they are done, and may be done twice
            self.counts.host_syncs += 1
            out = func(*args, **kwargs)
        return _laid_out(name, args[0], out) if name in LAID_OUT and args[0].is_meta else out


def _made(given: list[Tensor], out: object) -> list[Tensor]:
    """The results with memory of their own."""
    known = _storages(given)
    return [tensor for tensor in tensors_of(out) if is_packed(tensor) or not _storages([tensor]) <= known]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if not is_packed(tensor)}


def _allocated(tensor: Tensor) -> int:
    return size_of([tensor]) if is_packed(tensor) else tensor.untyped_storage().nbytes()


def _laid_out(name: str, given: Tensor, out: Tensor) -> Tensor:
    """A result without data in the layout that it has on a device, on which depends what is copied later."""
    if name == "scaled_dot_product_attention":  # (B, heads, A, D), of which a token's heads are one row
        return out.new_empty(out.transpose(1, 2).shape).transpose(1, 2)
    channels_last = given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _flops(func: Any, name: str, args: tuple, kwargs: dict, out: object) -> int:
    if name in FLOPS:
        return FLOPS[name](out, *args, **kwargs)
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _terms(*given: object) -> int:
    """The products in each number of a packed convolution; a map to be added may stand before its weight."""
    weight = next(each for each in given if isinstance(each, Tensor) and is_packed(each))
    return prod(weight.shape[1:])


def _bytes_moved(func: Any, name: str, args: tuple, kwargs: dict, made: list[Tensor]) -> int:
    given = tensors_of((args, kwargs))
    if name in PICKS:
        return size_of(given[1:]) + 2 * size_of(made)
    if name in PUTS:
        return size_of(given[1:]) + size_of(given[-1:])
    read, written = 0, size_of(made)
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        size, writes = size_of(tensors_of(value)), argument.alias_info is not None and argument.alias_info.is_write
        written += size if writes else 0
        read += 0 if argument.is_out or (writes and name in OVERWRITES) else size
    return read + written
