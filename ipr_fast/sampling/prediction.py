"""The output of a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipr_fast.sampling.patches import ActivePatches


class Prediction(NamedTuple):
    """A denoiser's output for n patches per chain: all N of them, or the A active slots.

    velocity      (B, n, P)  u = eps - x
    variance_mix  (B, n, P)  v in [0, 1], or None: the smaller standard deviation of the posterior is used
    log_variance  (B, n)     the model's uncertainty, or None: waiting patches start in the order of their ids
    """

    velocity: Tensor
    variance_mix: Tensor | None = None
    log_variance: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Apply a function to every field that is not None."""
        _, mix, log_variance = self
        return Prediction(
            function(self.velocity),
            None if mix is None else function(mix),
            None if log_variance is None else function(log_variance),
        )

    def at(self, active: ActivePatches) -> Prediction:
        """Gather the prediction of all patches to the active slots."""
        return self.map(active.gather)


def apart_from(prediction: Any, written: Iterable[Tensor]) -> Any:
    """Return a prediction with copies of the fields that share memory with tensors that are to be written."""
    memory = {tensor.untyped_storage()._cdata for tensor in written}
    fields = (
        field.clone() if field is not None and field.untyped_storage()._cdata in memory else field
        for field in prediction
    )
    return type(prediction)(*fields)


class LogitPrediction(NamedTuple):
    """A Prediction whose variance mix is still to pass a sigmoid, which the engine's step takes with it.

    velocity (B, n, P), mix_logit (B, n, P), log_variance (B, n).
    """

    velocity: Tensor
    mix_logit: Tensor
    log_variance: Tensor | None = None

    def finished(self) -> Prediction:
        """Return the prediction with its mix."""
        return Prediction(self.velocity, self.mix_logit.sigmoid(), self.log_variance)


def preserves_variance(model: object) -> bool:
    """Return whether a model's variance mix is between the bounds of a flow that preserves variance."""
    return bool(getattr(model, "preserves_variance", False))


def mix_range(mix: Tensor | None, occupied: Tensor) -> Tensor | None:
    """Return the smallest and largest variance mix (B, A, P) in the occupied slots (B, A), as a tensor (2,)."""
    if mix is None or not mix.numel():
        return None
    return torch.stack(torch.aminmax(torch.where(occupied[..., None], mix.float(), 0.5)))


HALF = {torch.bfloat16, torch.float16}


def patch_dtype(model: Any) -> torch.dtype:
    """Return the type in which a model's calls get patches: its `patch_dtype`, by default that of its weights.

    float32 for a model without weights, or with weights of several types. Levels are float32, whatever the type.
    """
    own = getattr(model, "patch_dtype", None)
    if isinstance(own, torch.dtype):
        return own
    if not isinstance(model, nn.Module):
        return torch.float32
    found = None
    for weight in model.parameters():  # in every step: ends at the first weight of float32
        if not weight.is_floating_point() or weight.dtype == found:
            continue
        if found is not None or weight.dtype not in HALF:
            return torch.float32
        found = weight.dtype
    return found or torch.float32


def as_taken(model: Any, values: Tensor) -> Tensor:
    """Return patches in the type in which a model's calls get them; tokens as they are."""
    return values.to(patch_dtype(model)) if values.is_floating_point() else values
