"""What a denoiser returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches


class Prediction(NamedTuple):
    """A denoiser's output for n patches a chain: all N of them, or the A active slots.

    velocity      (B, n, P)  u = eps - x
    variance_mix  (B, n, P)  v in [0, 1], or None: the posterior's small standard deviation is used
    log_variance  (B, n)     the model's uncertainty, or None: waiting patches start in the order of their ids
    """

    velocity: Tensor
    variance_mix: Tensor | None = None
    log_variance: Tensor | None = None

    def at(self, active: ActivePatches) -> Prediction:
        """The predictions of all patches, gathered to the active slots."""
        return Prediction(*(None if field is None else active.gather(field) for field in self))


def mix_range(mix: Tensor | None, occupied: Tensor) -> Tensor | None:
    """The smallest and largest variance mix (B, A, P) of the occupied slots (B, A): a tensor (2,), on their device."""
    if mix is None or not mix.numel():
        return None
    return torch.stack(torch.aminmax(torch.where(occupied[..., None], mix.float(), 0.5)))
