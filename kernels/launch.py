"""When an operation runs as its Triton kernel, and what the launchers share.

An operation takes its kernel for tensors on a GPU, and for any tensor under Triton's interpreter (TRITON_INTERPRET=1,
set before this package is imported); its torch twin otherwise, and wherever Triton is not installed.
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


DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernels compute with, in float32 inside


def jit(function: Callable) -> Any:
    """`triton.jit` where there is Triton; else the function as it stands, never to be called."""
    return function if triton is None else triton.jit(function)


def runs_kernel(kernel: Any, *tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors, the first of which says where, is to launch `kernel`.

    Never where autograd would need its derivative, nor for float64.
    """
    if triton is None or not (tensors[0].is_cuda or not isinstance(kernel, triton.runtime.JITFunction)):
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(tensor.dtype in DTYPES for tensor in given if tensor.is_floating_point())


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel, of whose arguments `tensor` is the first, on the device of that tensor."""
    with torch.cuda.device_of(tensor):
        kernel[grid](tensor, *arguments, **options)


def contiguous(**tensors: Tensor | None) -> None:
    """A launcher's contract: each tensor, where given, is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} of shape {tuple(tensor.shape)}")


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """Rows (B, A, P), perhaps a slice of a larger tensor, and the numbers between two of them; a copy where need be."""
    _, slots, numel = tensor.shape
    if (numel == 1 or tensor.stride(2) == 1) and tensor.stride(0) == slots * tensor.stride(1):
        return tensor, tensor.stride(1)
    return tensor.contiguous(), numel


def table_of(tensor: Tensor) -> tuple[Tensor, int]:
    """A table (R, P), perhaps a slice of a wider one, and the numbers between two of its rows; a copy where need be."""
    tensor = tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


def power_of_2(number: int, low: int = 1) -> int:
    """The smallest power of two that is at least `number` and `low`."""
    return max(low, 1 << max(0, number - 1).bit_length())
