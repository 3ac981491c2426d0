"""What the calls of a regeneration tell of each patch or token, for mask policies and mask_fns that ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks


class Signals(NamedTuple):
    """What a model told of each patch or token when it was last regenerated, (B, N) float32 each.

    NaN where a call of `refine_batch` has not regenerated it yet; where `accept` rejects a sample, that of the kept.

    uncertainty  of a patch: the log-variance that the model predicts, in the mean over the steps that denoised it;
                 of a token: -log p in nats, with its probability p, untempered, in the step that revealed it
    entropy      of tokens alone: that of the law over the vocabulary in the same step, in nats; None for patches
    """

    uncertainty: Tensor
    entropy: Tensor | None = None

    @classmethod
    def unknown(cls, number: int, shape: tuple[int, ...], device: torch.device) -> Signals:
        """Return as many signals of this shape (B, N), of which none is known."""
        return cls(*(torch.full(shape, torch.nan, dtype=torch.float32, device=device) for _ in range(number)))

    def where(self, taken: Tensor, others: Signals) -> Signals:
        """Return these signals of the chains that are `taken` (B,) bool, and others of the rest."""
        pairs = zip(self.present, others.present, strict=True)
        return Signals(*(torch.where(taken[:, None], ours, theirs) for ours, theirs in pairs))

    def clone(self) -> Signals:
        return Signals(*(each.clone() for each in self.present))

    @property
    def present(self) -> tuple[Tensor, ...]:
        """The signals that there are."""
        return tuple(each for each in self if each is not None)


def names(function: Callable[..., object], argument: str) -> bool:
    """Return whether a function has an argument of this name."""
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return False


def check_log_variance(model: object, log_variance: Tensor | None) -> None:
    """Raise ValueError for a model of patches without log-variances, of which the signals are made."""
    if log_variance is None:
        raise ValueError(
            f"mask_fn: its signals are the log-variances that a model predicts, and {checks.name_of(model)} predicts "
            "none: its Prediction.log_variance is None"
        )
