"""Counts launches of Triton kernels, with FLOPs and bytes, without launching any: for bench/support/counts.py.

The launchers of kernels/ run as on a GPU; a stand-in reports the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ipr_fast.kernels import (
    accept,
    advance,
    categorical,
    context_mask,
    denoise,
    group_norm,
    linear,
    logits,
    map_sum,
    mask_tokens,
    modulated_norm,
    partial_attention,
    pixel_features,
    pixel_head,
    renoise,
    residual_norm,
    reveal,
    slot_inputs,
    threshold,
)
from ipr_fast.kernels.launch import triton

Report = Callable[[str, int, int, list[Tensor]], None]  # name of the kernel, FLOPs, bytes, tensors

FILES = (
    accept,
    advance,
    categorical,
    context_mask,
    denoise,
    group_norm,
    linear,
    map_sum,
    mask_tokens,
    modulated_norm,
    partial_attention,
    pixel_features,
    pixel_head,
    renoise,
    residual_norm,
    reveal,
    slot_inputs,
    threshold,
)
BYTES = {
    "accept_kernel": lambda given: accept.bytes_moved(len(given["p_reward"]), given["NUMEL"], 4),
    "advance_kernel": lambda given: advance.bytes_moved(*given["p_start"].shape, given["p_row"] is not None),
    "categorical_kernel": lambda given: _of_logits(given),
    "context_mask_kernel": lambda given: context_mask.bytes_moved(
        *given["p_index"].shape, given["N"], given["p_bias"].element_size()
    ),
    "denoise_kernel": lambda given: denoise.bytes_moved(
        given["SLOTS"],
        given["P"],
        given["p_velocity"].element_size(),
        given["p_mix"] is not None,
        0 if given["p_values"] is None else given["p_values"].element_size(),
    ),
    "group_norm_kernel": lambda given: _of_norm(given),
    "group_norm_turns_kernel": lambda given: _of_norm(given),
    "layer_norm_kernel": lambda given: _of_tokens(given, modulated_norm.bytes_moved),
    "linear_kernel": lambda given: linear.bytes_moved(given["M"], given["N"], given["K"]),
    "map_sum_kernel": lambda given: map_sum.bytes_moved(
        given["NUMEL"], given["p_h"].element_size(), given["p_g"] is not None
    ),
    "mask_tokens_kernel": lambda given: mask_tokens.bytes_moved(*given["p_mask"].shape, given["A"]),
    "partial_attention_kernel": lambda given: _of_attention(given),
    "partial_attention_rows_kernel": lambda given: _of_attention(given),
    "renoise_kernel": lambda given: renoise.bytes_moved(*given["p_mask"].shape, given["A"], given["P"]),
    "residual_norm_kernel": lambda given: _of_tokens(given, _residual_norm_bytes(given)),
    "reveal_kernel": lambda given: reveal.bytes_moved(*given["p_index"].shape, given["p_index"].numel()),
    "slot_inputs_kernel": lambda given: slot_inputs.bytes_moved(
        *given["p_index"].shape, given["P"], given["p_values"].element_size()
    ),
    "threshold_kernel": lambda given: _of_logits(given),
}  # with every slot changing and tables in cache; the other kernels read or write each of their tensors once
FLOPS = {
    name: lambda given: 4 * given["p_q"].numel() * given["N"]  # matrix products alone
    for name in ("partial_attention_kernel", "partial_attention_rows_kernel")
}
FLOPS["linear_kernel"] = lambda given: 2 * given["M"] * given["N"] * given["K"]  # of one product of numbers, not three


def can_be_counted() -> bool:
    """Return whether Triton compiles kernels here: it is installed, and not interpreting."""
    return bool(_kernels())


@contextmanager
def launches_to(report: Report) -> Iterator[None]:
    """Within, operations take their Triton kernels on any device, and launches are reported instead."""
    if not can_be_counted():
        raise RuntimeError("counting kernels needs Triton, without its interpreter")
    with ExitStack() as stack:
        for file, name, kernel in _kernels():
            stack.enter_context(patch.object(file, name, _Launcher(kernel, report)))
        yield


def tensors_of(tree: object) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors in memory; an expanded dimension counts once."""
    return sum(tensor.element_size() * prod(_in_memory(tensor)) for tensor in tensors)


def is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor has oneDNN's packed layout, without strides or storage."""
    return tensor.layout != torch.strided


def _in_memory(tensor: Tensor) -> list[int]:
    """The sizes of the dimensions that are not expanded."""
    if is_packed(tensor):
        return list(tensor.shape)
    return [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n]


def _of_tokens(given: dict[str, Any], with_tables: Callable[[int, int, int, int, bool], int]) -> int:
    """Bytes of an operation that modulates tokens; without tables, each tensor once."""
    if given["p_row"] is None:
        return size_of(tensors_of(given))
    return with_tables(1, given["ROWS"], given["W"], given["p_h"].element_size(), True)


def _residual_norm_bytes(given: dict[str, Any]) -> Callable[[int, int, int, int, bool], int]:
    return partial(residual_norm.bytes_moved, embeds=given["p_index"] is not None)


def _of_logits(given: dict[str, Any]) -> int:
    return logits.bytes_moved(given["p_index"].numel(), given["V"], given["p_logits"].element_size())


def _of_attention(given: dict[str, Any]) -> int:
    """Bytes of attention: of every token's key and value, one of the two places where it may be."""
    batch, slots, width = given["p_q"].shape
    return partial_attention.bytes_moved(batch, slots, given["N"], width, given["p_q"].element_size())


def _of_norm(given: dict[str, Any]) -> int:
    """Bytes of a GroupNorm: of the map, the others being small."""
    out = given["p_out"]
    return group_norm.bytes_moved(*out.shape, out.element_size())


def _kernels() -> list[tuple[Any, str, Any]]:
    """Return (module, name, kernel) for every kernel."""
    return [
        (file, name, kernel)
        for file in FILES
        for name, kernel in vars(file).items()
        if triton is not None and name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction)
    ]


@dataclass(frozen=True)
class _Launcher:
    """Stands in for a kernel and reports its launches."""

    kernel: Any
    report: Report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        name, tensors = self.kernel.__name__, tensors_of(arguments)
        given = dict(zip(self.kernel.arg_names, arguments, strict=False))
        moved = BYTES[name](given) if name in BYTES else size_of(tensors)
        self.report(name, FLOPS[name](given) if name in FLOPS else 0, moved, tensors)
