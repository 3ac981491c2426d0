"""Linear layers in float32 on tensor cores: float32's accuracy, at twice the rate of its own units.

    out = x W' + b, or GELU(x W' + b) in its tanh form

    a b = big(a) small(b) + small(a) big(b) + big(a) big(b),    big(a) = a rounded to 11 bits, small(a) = a - big(a)

TF32 holds 11 bits, so both parts of a number are exact, but for the last of its 24 bits, and what is left out is below
2^-22 of a product. An infinite number becomes NaN. The weights are split once, by `split`. Tensor cores cut the sums
off where float32 rounds them: so they add K_BLOCK products at a time, and float32 adds their sums.

Shapes: x (..., K), any strides; parts (2, N, K); bias (N,) or None; out (..., N), a slice of `columns` if given.
Bytes that must move: 4 (M K + 2 N K + M N) for M rows; 6 M N K operations, of which a float32 product has 2.
Source: Ootomo and Yokota 2022 (sums of TF32, and adding outside of the tensor cores).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.kernels.launch import contiguous, jit, launch, runs_kernel

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None

ROUND, BIG = 1 << 12, -(1 << 13)  # half of the lowest bit of TF32 in float32's, and a mask of its bits
FEW, MANY = 128, 1024  # programs: too few of 64 x 64 for a GPU, enough for twice as large tiles
MAX_WEIGHTS = 1 << 30  # of a layer: offsets of its parts are 32-bit integers
MIN_CAPABILITY = (8, 0)  # of a GPU whose tensor cores take TF32


@jit
def linear_kernel(
    p_x,
    p_parts,
    p_bias,
    p_out,
    M,
    N,
    K,
    X_ROW,
    OUT_ROW,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    EVEN: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """One program for M_BLOCK rows and N_BLOCK columns; programs of the same rows follow each other."""
    blocks = tl.cdiv(N, N_BLOCK)
    i_m, i_n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_m, o_n, o_k = i_m * M_BLOCK + tl.arange(0, M_BLOCK), i_n * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    m_x, m_w = (o_m < M)[:, None], (o_n < N)[None, :]
    p_x += o_m[:, None] * X_ROW + o_k[None, :]
    p_parts += o_n[None, :] * K + o_k[:, None]
    total = tl.zeros([M_BLOCK, N_BLOCK], tl.float32)
    for k in range(0, K, K_BLOCK):
        if EVEN:
            x = tl.load(p_x, mask=m_x, other=0.0)
            w = tl.load(p_parts, mask=m_w, other=0.0)
            w_small = tl.load(p_parts + N * K, mask=m_w, other=0.0)
        else:
            m_k = o_k < K - k
            x = tl.load(p_x, mask=m_x & m_k[None, :], other=0.0)
            w = tl.load(p_parts, mask=m_w & m_k[:, None], other=0.0)
            w_small = tl.load(p_parts + N * K, mask=m_w & m_k[:, None], other=0.0)
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000  # ROUND and BIG, as in `split`
        x_big = bits.to(tl.float32, bitcast=True)
        products = tl.dot(x - x_big, w, input_precision="tf32")
        products = tl.dot(x_big, w_small, products, input_precision="tf32")
        products = tl.dot(x_big, w, products, input_precision="tf32")
        total += products
        p_x += K_BLOCK
        p_parts += K_BLOCK
    if BIAS:
        total += tl.load(p_bias + o_n, mask=o_n < N, other=0.0)[None, :]
    if GELU:  # x / (1 + exp(-2 u)) = x (1 + tanh(u)) / 2, with exp(-2 u) as a power of 2
        total /= 1.0 + tl.exp2(total * (-2.302208198 - 0.1029432397 * total * total))
    tl.store(p_out + o_m[:, None] * OUT_ROW + o_n[None, :], total, mask=m_x & m_w)


def linear(
    x: Tensor, parts: Tensor, bias: Tensor | None = None, *, gelu: bool = False, columns: int | None = None
) -> Tensor:
    """Return the layer's output (..., N), for weights from `split`; a slice of rows of `columns` numbers, if given."""
    _, N, K = parts.shape
    columns = N if columns is None else columns
    if x.shape[-1] != K or columns < N:
        raise ValueError(f"x must have {K} columns and the result at least {N}, got {tuple(x.shape)} and {columns}")
    if x.dtype != torch.float32 or not runs_kernel(linear_kernel, x, parts, bias):
        return _linear(x, parts, bias, gelu)
    contiguous(parts=parts)
    bias = None if bias is None else bias.contiguous()
    rows = x.reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], columns, dtype=torch.float32, device=x.device)
    if out.numel() > 0:
        blocks = tile(len(rows), N, K)
        launch(
            linear_kernel,
            (-(-len(rows) // blocks["M_BLOCK"]) * -(-N // blocks["N_BLOCK"]),),
            rows,
            parts,
            bias,
            out,
            len(rows),
            N,
            K,
            rows.stride(0),
            out.shape[-1],
            BIAS=bias is not None,
            GELU=gelu,
            EVEN=K % blocks["K_BLOCK"] == 0,
            **blocks,
        )
    return out[..., :N]


def tile(rows: int, columns: int, inputs: int) -> dict[str, int]:
    """Return the sizes of a tile, and the warps and stages of a program: within 10 % of the fastest on an H100."""
    programs = -(-rows // 64) * -(-columns // 64)
    if programs < FEW:
        sizes = 16, 32, 64, 2, 3
    elif inputs % 32 > 0:
        sizes = 64, 64, 16, 4, 4
    elif programs >= MANY and columns % 128 == 0:
        sizes = 64, 128, 32, 4, 3
    else:
        sizes = 64, 64, 32, 4, 3
    return dict(zip(("M_BLOCK", "N_BLOCK", "K_BLOCK", "num_warps", "num_stages"), sizes, strict=True))


def split(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the parts (2, N, K) of a float32 weight (N, K), in `out` if it is of their shape and device."""
    if out is None or out.shape[1:] != weight.shape or out.device != weight.device:
        out = torch.empty(2, *weight.shape, dtype=torch.float32, device=weight.device)
    big, small = out
    torch.add(weight.contiguous().view(torch.int32), ROUND, out=big.view(torch.int32)).bitwise_and_(BIG)
    torch.sub(weight, big, out=small)
    return out


def runs_on(tensor: Tensor) -> bool:
    """Return whether the kernel gains anything for weights like this one: float32, on a GPU that multiplies TF32."""
    if tensor.dtype != torch.float32 or not 0 < tensor.numel() <= MAX_WEIGHTS:
        return False
    if not runs_kernel(linear_kernel, tensor.detach()):
        return False
    return not tensor.is_cuda or (torch.version.hip is None and capability(tensor.device) >= MIN_CAPABILITY)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def takes_tf32() -> bool:
    """Return whether torch's own products of float32 may be those of TF32 at present, which are faster."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the program has set torch's newer switches; the older one cannot be read then
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def bytes_moved(rows: int, columns: int, inputs: int) -> int:
    """Return the bytes that must move."""
    return 4 * (rows * inputs + 2 * columns * inputs + rows * columns)


def _linear(x: Tensor, parts: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """The torch twin."""
    out = F.linear(x, parts[0] + parts[1], bias)
    return F.gelu(out, approximate="tanh") if gelu else out
