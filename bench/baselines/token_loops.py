"""Baselines: samplers of masked diffusion as loops in plain torch, as published.

    llada    Nie et al. 2025 (ML-GSAI/LLaDA, `generate.py`): reveals the tokens with the highest probability, the same
             number in every step; a Gumbel number in float64 for every id at every position
    remdm    Wang et al. 2025 (kuleshov-group/remdm, `diffusion.py`): ReMDM-cap, by categorical draws of which masking
             is one more outcome; likewise in float64, with a sort of the vocabulary for a nucleus

Both take the logits of all positions of a batch and read numbers of the schedule from the device in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]  # logits (B, N, V) of tokens (B, N)
EPS = 1e-5  # the last time of ReMDM
TINY = 1e-10  # that keeps its logarithms finite


@torch.inference_mode()
def llada(
    network: Network,
    x: Tensor,
    steps: int,
    *,
    mask_id: int,
    temperature: float = 1.0,
    order: str = "confidence",
) -> Tensor:
    """Replace the masked positions of tokens x (B, N), in `steps` steps.

    order: "confidence", or "random". With no temperature the most probable tokens.
    """
    x, numbers = x.clone(), _numbers(x == mask_id, steps)
    for step in range(steps):
        masked, logits = x == mask_id, network(x)
        noise = torch.rand_like(logits, dtype=torch.float64)
        drawn = (logits.double().exp() / (-noise.log()) ** temperature).argmax(-1)
        if order == "confidence":
            score = logits.double().softmax(-1).gather(-1, drawn[..., None])[..., 0]
        else:
            score = torch.rand(drawn.shape, dtype=torch.float64, device=x.device)
        drawn, score = torch.where(masked, drawn, x), torch.where(masked, score, -torch.inf)
        revealed = torch.zeros_like(masked)
        for chain in range(len(x)):
            revealed[chain, score[chain].topk(int(numbers[chain, step].item())).indices] = True
        x[revealed] = drawn[revealed]
    return x


def _numbers(masked: Tensor, steps: int) -> Tensor:
    """Return how many tokens each step reveals, (B, steps): one more in the first ones if they do not divide."""
    count = masked.sum(1, keepdim=True)
    return count // steps + (torch.arange(steps, device=masked.device) < count % steps)


@torch.inference_mode()
def remdm(
    network: Network,
    x: Tensor,
    steps: int,
    *,
    mask_id: int,
    eta: float = 0.008,
    top_p: float = 1.0,
) -> Tensor:
    """Replace the masked positions of tokens x (B, N); with eta = 0 by MDLM's sampler."""
    times, law = torch.linspace(1, EPS, steps + 1, device=x.device), None
    for now, then in pairwise(times):
        if law is None:
            law = _nucleus(_law(network, x, mask_id), top_p)
        before, after = (1 - now).item(), (1 - then).item()
        sigma = min(eta, (1 - after) / before) if before > 0 else eta
        if_visible = law * (1 - sigma)
        if_visible[..., mask_id] = sigma
        if_masked = law * ((after - (1 - sigma) * before) / (1 - before))
        if_masked[..., mask_id] = (1 - after - sigma * before) / (1 - before)
        following = _categorical(torch.where((x != mask_id)[..., None], if_visible, if_masked))
        if not torch.equal(following, x):  # else the network would say the same
            law = None
        x = following
    return _law(network, x, mask_id).argmax(-1)


def _law(network: Network, x: Tensor, mask_id: int) -> Tensor:
    """Return the probabilities (B, N, V): never the mask, and the token itself where one is visible."""
    logits = network(x)
    logits[..., mask_id] = -torch.inf
    law, visible = logits.softmax(-1), x != mask_id
    law[visible] = 0
    law[visible, x[visible]] = 1
    return law


def _nucleus(law: Tensor, top_p: float) -> Tensor:
    """Return the law of the most probable ids that have at most top_p together, but of the first one at least."""
    if top_p >= 1:
        return law
    ordered, ids = law.sort(-1, descending=True)
    kept = ordered.cumsum(-1) <= top_p
    kept[..., 0] = True
    ordered = ordered * kept
    return torch.zeros_like(law).scatter_(-1, ids, ordered / ordered.sum(-1, keepdim=True))


def _categorical(law: Tensor) -> Tensor:
    """Draw from probabilities (..., V): exponential races in float64."""
    exponential = TINY - (torch.rand_like(law, dtype=torch.float64) + TINY).log()
    return (law.double() / exponential).argmax(-1)
