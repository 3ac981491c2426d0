"""Operations of a training step, and the peak rate of matrix products on the device."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.tokens import TokenPrediction

SIDE = {"cuda": 8192, "cpu": 768}  # of the timed square matrices
ROUNDS = 5


def training_flops(model: PatchTransformer | TokenTransformer) -> int:
    """Count the FLOPs of a forward and backward pass of a model for one sample.

    Matrix products and attention only, on meta tensors; a multiply-add is two operations.
    """
    empty = copy.deepcopy(model).to("meta").train()
    prediction: Prediction | TokenPrediction
    with FlopCounterMode(display=False) as counter:
        if isinstance(empty, TokenTransformer):
            tokens = torch.empty(1, empty.length, dtype=torch.int64, device="meta")
            prediction = empty.predict(tokens, tokens > 0)
        else:
            x = torch.empty(1, empty.grid.num_patches, empty.grid.patch_numel, device="meta")
            prediction = empty.predict(x, x[..., 0], x[..., 0] > 0)
        torch.stack([field.sum() for field in prediction if field is not None]).sum().backward()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product: the best of ROUNDS runs."""
    side = SIDE.get(device.type, SIDE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    _timed(a, b)
    return 2 * side**3 / min(_timed(a, b) for _ in range(ROUNDS))


def _timed(a: Tensor, b: Tensor) -> float:
    _synchronize(a.device)
    begun = time.perf_counter()
    torch.mm(a, b)
    _synchronize(a.device)
    return time.perf_counter() - begun


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
