"""The launches of Triton kernels, with their FLOPs and bytes, where none is launched: for bench/support/counts.py.

The launchers of kernels/ run as they do on a GPU, and what they would have launched is reported in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ipr_fast.kernels import advance, denoise, gated_sum, group_norm, modulated_norm, partial_attention, renoise
from ipr_fast.kernels.launch import triton

Report = Callable[[str, int, int, list[Tensor]], None]  # a kernel's name, its FLOPs and bytes, the tensors it was given

FILES = (advance, denoise, gated_sum, group_norm, modulated_norm, partial_attention, renoise)
BYTES = {
    "advance_kernel": lambda given: advance.bytes_moved(*given["p_start"].shape),
    "denoise_kernel": lambda given: denoise.bytes_moved(
        given["SLOTS"], given["P"], given["p_velocity"].element_size(), given["p_mix"] is not None
    ),
    "gated_sum_kernel": lambda given: _of_tokens(given, gated_sum.bytes_moved),
    "layer_norm_kernel": lambda given: _of_tokens(given, modulated_norm.bytes_moved),
    "renoise_kernel": lambda given: renoise.bytes_moved(*given["p_mask"].shape, given["A"], given["P"]),
}  # as if every slot moved and tables stayed in cache; the other kernels read or write each of their tensors once
FLOPS = {"partial_attention_kernel": lambda given: 4 * given["p_q"].numel() * given["N"]}  # matrix products alone


def can_be_counted() -> bool:
    """Whether there is Triton, and not its interpreter, whose kernels are others."""
    return bool(_kernels())


@contextmanager
def launches_to(report: Report) -> Iterator[None]:
    """Within, operations take their Triton kernels for tensors of any device, and launches are reported instead."""
    if not can_be_counted():
        raise RuntimeError("to count kernels takes Triton, and not its interpreter")
    with ExitStack() as stack:
        for file, name, kernel in _kernels():
            stack.enter_context(patch.object(file, name, _Launcher(kernel, report)))
        yield


def tensors_of(tree: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of tensors; what is expanded along a dimension stands in memory once."""
    return sum(tensor.element_size() * prod(_in_memory(tensor)) for tensor in tensors)


def is_packed(tensor: Tensor) -> bool:
    """Whether it holds weights in a layout of oneDNN's, which has neither strides nor a storage."""
    return tensor.layout != torch.strided


def _in_memory(tensor: Tensor) -> list[int]:
    """The sizes of the dimensions that are not expanded."""
    if is_packed(tensor):
        return list(tensor.shape)
    return [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n]


def _of_tokens(given: dict[str, Any], with_tables: Callable[[int, int, int, int, bool], int]) -> int:
    """Of an operation that modulates tokens: without tables each tensor once, of which some may be expanded."""
    if given["p_row"] is None:
        return size_of(tensors_of(given))
    return with_tables(1, given["ROWS"], given["W"], given["p_h"].element_size(), True)


def _kernels() -> list[tuple[Any, str, Any]]:
    """Every file, name and kernel that a launcher may launch."""
    return [
        (file, name, kernel)
        for file in FILES
        for name, kernel in vars(file).items()
        if triton is not None and name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction)
    ]


@dataclass(frozen=True)
class _Launcher:
    """Stands in for a kernel."""

    kernel: Any
    report: Report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        name, tensors = self.kernel.__name__, tensors_of(arguments)
        given = dict(zip(self.kernel.arg_names, arguments, strict=False))
        moved = BYTES[name](given) if name in BYTES else size_of(tensors)
        self.report(name, FLOPS[name](given) if name in FLOPS else 0, moved, tensors)
