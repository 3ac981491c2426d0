"""PyTorch's attention for twins and networks, without cuDNN's.

On Hopper and newer, torch prefers cuDNN in half precision. It plans for 0.4 s at each new shape, and its gradient of
masked attention had NaNs (pytorch issue 196678). So torch chooses among flash, efficient and math.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_switch = threading.RLock()  # torch's switch is the whole process's


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), on a GPU not by cuDNN.

    Backends that the user has switched off stay off, but in functions of torch.compile.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if torch.compiler.is_compiling():  # reading a switch would break the graph
        with sdpa_kernel(BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with _switch:  # 1.3 us, sdpa_kernel takes 23
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
