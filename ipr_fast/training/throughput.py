"""How fast a network trains, beside how fast the machine could multiply matrices at best."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cuda": 8192, "cpu": 768}  # of the matrices whose product is timed
ROUNDS = 5


def training_flops(model: nn.Module, patches: tuple[int, int]) -> int:
    """Operations of a forward and a backward pass through a PatchTransformer for one sample of patches (N, P).

    Those of products and attention, a multiplication and an addition being two; counted without data.
    """
    empty = copy.deepcopy(model).to("meta").train()
    x = torch.empty(1, *patches, device="meta")
    levels, is_active = x[..., 0], torch.empty(1, patches[0], dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        prediction = empty.predict(x, levels, is_active)
        (prediction.velocity.sum() + prediction.variance_mix.sum() + prediction.log_variance.sum()).backward()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product, of random numbers: the best of a few."""
    side = SIDE.get(device.type, SIDE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    _timed(a, b)
    return 2 * side**3 / min(_timed(a, b) for _ in range(ROUNDS))


def _timed(a: Tensor, b: Tensor) -> float:
    _wait(a.device)
    begun = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
