"""A feature map plus a bias for each of its channels, plus a second map: in place.

    h(b, c, y, x) <- h(b, c, y, x) + bias(c) + g(b, c, y, x)

On a GPU a convolution's bias is a pass of its own over the map. Here it shares one with a residual.

Shapes: h, g (B, C, H, W) channels-last; bias (C,). bias and g are optional.
Bytes that must move: 3 s B C H W; 2 s B C H W without g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import contiguous, jit, launch, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

BLOCK = 2048


@jit
def map_sum_kernel(p_h, p_bias, p_g, NUMEL, C, N_BLOCK: tl.constexpr):
    """One program for N_BLOCK numbers of the map."""
    first = tl.program_id(0).to(tl.int64) * N_BLOCK
    o_number = tl.arange(0, N_BLOCK)
    m_number = o_number < NUMEL - first
    o_channel = ((first % C).to(tl.int32) + o_number) % C
    h = tl.load(p_h + first + o_number, mask=m_number, other=0.0).to(tl.float32)
    if p_bias is not None:
        h += tl.load(p_bias + o_channel).to(tl.float32)
    if p_g is not None:
        h += tl.load(p_g + first + o_number, mask=m_number, other=0.0).to(tl.float32)
    tl.store(p_h + first + o_number, h, mask=m_number)


def map_sum(h: Tensor, bias: Tensor | None, g: Tensor | None = None) -> Tensor:
    """Write the sum into h, and return h."""
    if not runs_kernel(map_sum_kernel, h, bias, g):
        return _map_sum(h, bias, g)
    contiguous(bias=bias)
    for name, each in {"h": h, "g": g}.items():
        if each is not None and not each.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} must be channels-last, got strides {each.stride()} of shape {tuple(each.shape)}")
    if h.numel() and (bias is not None or g is not None):
        grid, channels = (-(-h.numel() // BLOCK),), h.shape[1]
        launch(map_sum_kernel, grid, h, bias, g, h.numel(), channels, N_BLOCK=BLOCK, num_warps=4)
    return h


def is_launched(h: Tensor) -> bool:
    """Return whether sums of maps on the device of h are launches of the kernel."""
    return runs_kernel(map_sum_kernel, h)


def bytes_moved(numel: int, size: int, two: bool) -> int:
    """Return the bytes that must move, for maps of `numel` numbers of `size` bytes."""
    return (3 if two else 2) * size * numel


def _map_sum(h: Tensor, bias: Tensor | None, g: Tensor | None) -> Tensor:
    """The torch twin."""
    total = h.to(torch.promote_types(h.dtype, torch.float32))
    total = total if bias is None else total + bias[:, None, None]
    return h.copy_(total if g is None else total + g)
