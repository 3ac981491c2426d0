"""The choice between an operation's Triton kernel and its torch twin, and helpers that the launchers share.

An operation runs its kernel on tensors on a GPU, and under Triton's interpreter (TRITON_INTERPRET=1, set before this
package is imported) on any tensor. Otherwise, and where Triton is not installed, it runs its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # macOS and Windows
    triton = None


DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels' inputs; they compute in float32
MIN_BLOCK = 2  # of slots: the interpreter of Triton 3.2 ignores the mask of a block of one element


def jit(function: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; without Triton return the function, which is then never called."""
    return function if triton is None else triton.jit(function)


def runs_kernel(kernel: Any, first: Tensor, *others: Tensor | None) -> bool:
    """Return whether an operation on these tensors launches `kernel`; they are on the device of the first.

    Never where autograd would need a derivative, nor for float64.
    """
    if triton is None or not (first.is_cuda or not isinstance(kernel, triton.runtime.JITFunction)):
        return False
    tensors = [first, *(tensor for tensor in others if tensor is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.dtype in DTYPES for tensor in tensors if tensor.is_floating_point())


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of `tensor`, its first argument."""
    with torch.cuda.device_of(tensor):
        kernel[grid](tensor, *arguments, **options)


def contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} of shape {tuple(tensor.shape)}")


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """Return rows (B, A, P), perhaps of a wider tensor, and their stride; a copy if there is no single stride."""
    _, slots, numel = tensor.shape
    if (numel == 1 or tensor.stride(2) == 1) and tensor.stride(0) == slots * tensor.stride(1):
        return tensor, tensor.stride(1)
    return tensor.contiguous(), numel


def table_of(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a table (R, P), perhaps a slice of a wider one, and its row stride; a copy if rows are not contiguous."""
    tensor = tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


def power_of_2(number: int, low: int = 1) -> int:
    """Return the smallest power of two >= `number`, at least `low`."""
    return max(low, 1 << max(0, number - 1).bit_length())
