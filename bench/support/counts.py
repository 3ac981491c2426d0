"""Counts of a piece of work: operators, host synchronisations, FLOPs, bytes, allocations.

Counts what PyTorch dispatches, with the torch twins, as on a CPU, or with Triton kernels, as on a GPU, though none is
launched. On tensors without data (device "meta") counting takes neither memory nor arithmetic, and gives the same on
every machine.

On a CPU the engine runs packed weights (ipr_fast/models/packed.py) where torch is built with oneDNN; meta tensors take
the plain layers, which have other operators and bytes.

Operators: a composite one counts as its parts, except linear layers, attention, GroupNorm and resampling, which every
    backend fuses. On a GPU the bias of a convolution is a sum of its own, as cuDNN's convolutions are called without.
    Views and reserved memory are free. A kernel launch is one operator.
FLOPs: of matrix products, convolutions and attention, by torch's flop counter. The sum or GELU that ends a packed layer
    adds none.
Bytes: of the tensors that an operator reads and writes, each once; for an index, of the picked elements. A cache may
    save some of them.
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
OVERWRITES = {"copy_", "fill_", "zero_"}  # do not read the old values
PICKS = {"embedding", "gather", "index", "index_select"}  # read of the first tensor as much as they return
PUTS = {"index_copy_", "index_put_", "scatter_"}  # write into the first tensor as much as the last one holds
LAID_OUT = {"convolution", "group_norm", "scaled_dot_product_attention"}  # meta results get a device's layout
FLOPS = {
    "addmm_": lambda out, sums, a, b: 2 * a.numel() * b.shape[1],
    "linear": lambda out, x, weight, bias=None: 2 * x.numel() * weight.shape[0],
    "scaled_dot_product_attention": lambda out, q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    "mkldnn::_linear_pointwise": lambda out, x, weight, *_: 2 * x.numel() * weight.shape[0],
    "mkldnn::_convolution_pointwise": lambda out, *given: 2 * out.numel() * _terms(*given),
    "mkldnn::_convolution_pointwise_": lambda out, *given: 2 * out.numel() * _terms(*given),
}  # operators that torch's flop counter decomposes or does not know


class Operation(NamedTuple):
    """One call of an operator, or one launch of a kernel."""

    name: str
    flops: int
    bytes: int


@dataclass
class Counts:
    """Counts of a piece of work. allocated: bytes. given: addresses of the storages that operators read."""

    operations: list[Operation] = field(default_factory=list)
    host_syncs: int = 0
    allocations: int = 0
    allocated: int = 0
    given: set[int] = field(default_factory=set)

    def add(self, name: str, flops: int, moved: int, given: list[Tensor]) -> None:
        """Add an operation on the tensors given."""
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
        """Calls of each operator."""
        return Counter(each.name for each in self.operations)


def count(work: Callable[[], object], device: torch.device | str, *, kernels: bool = False) -> Counts:
    """Count what `work` does with tensors on a device; beside a GPU, tensors of the host do not count.

    kernels: count Triton kernels instead of twins, for meta tensors, as nothing is launched. Raises RuntimeError
    without Triton, and under its interpreter.
    """
    counts = Counts()
    device = torch.device(device)
    with (
        torch.inference_mode(),
        launches_to(counts.add) if kernels else nullcontext(),
        _Counting(counts, device, adds_biases=kernels or device.type == "cuda"),
    ):
        work()
    return counts


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, device: torch.device, adds_biases: bool) -> None:
        super().__init__()
        self.counts, self.device, self.adds_biases = counts, device, adds_biases
        # On a CPU only reads of the data count: a tensor made of Python's numbers is no copy there.
        self.watch = Watch("the work", None if device.type == "cpu" else device)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
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
                if self.adds_biases and name == "convolution" and args[2] is not None:
                    self.counts.add("add_", 0, 2 * size_of(made), [])
        return out

    def _run(self, func: Any, name: str, types: Any, args: tuple, kwargs: dict) -> object:
        try:
            out = self.watch.__torch_dispatch__(func, types, args, kwargs)
        except CaptureError:  # a copy is detected after it is done, and may be repeated
            self.counts.host_syncs += 1
            out = func(*args, **kwargs)
        return _laid_out(name, args[0], out) if name in LAID_OUT and args[0].is_meta else out


def _made(given: list[Tensor], out: object) -> list[Tensor]:
    """Return the results with memory of their own."""
    known = _storages(given)
    return [tensor for tensor in tensors_of(out) if is_packed(tensor) or not _storages([tensor]) <= known]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if not is_packed(tensor)}


def _allocated(tensor: Tensor) -> int:
    return size_of([tensor]) if is_packed(tensor) else tensor.untyped_storage().nbytes()


def _laid_out(name: str, given: Tensor, out: Tensor) -> Tensor:
    """Return a meta result in the layout that it has on a device, on which later copies depend."""
    if name == "scaled_dot_product_attention":  # (B, heads, A, D) in memory as (B, A, heads, D)
        return out.new_empty(out.transpose(1, 2).shape).transpose(1, 2)
    channels_last = given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _flops(func: Any, name: str, args: tuple, kwargs: dict, out: object) -> int:
    if name in FLOPS:
        return FLOPS[name](out, *args, **kwargs)
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _terms(*given: object) -> int:
    """Return the products per output of a packed convolution; a map to be added may precede its weight."""
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
