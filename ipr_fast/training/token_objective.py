"""The training objective of tokens: which positions of a batch are active and masked, and the cross-entropy.

Everything is drawn on the generator's device, with no host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.tasks.base import Task
from ipr_fast.training.objective import sample_roles, uniform
from ipr_fast.training.samples import check_form, check_tokens


class TokenBatch(NamedTuple):
    """Clean tokens (B, N) int64; which of them are active and, of these, masked: (B, N) bool."""

    tokens: Tensor
    is_active: Tensor
    is_masked: Tensor


class TokenLosses(NamedTuple):
    """Scalars. cross_entropy: of the tokens at masked positions, their mean over the batch."""

    cross_entropy: Tensor


class TokenObjective:
    """Trains a TokenTransformer on the samples of a TokenTask. few_active: as for `sample_roles`."""

    losses_type = TokenLosses
    head = own = None

    def __init__(self, task: Task, model: TokenTransformer, few_active: float = 0.0) -> None:
        self.task, self.model, self.few_active = task, model, few_active
        self._has_seen_values = False

    def draw(self, batch_size: int, generator: torch.Generator) -> TokenBatch:
        """Draw a batch; check its shape and dtype each time, its tokens the first time only."""
        tokens = self.task.sample(batch_size, generator)
        check_form(self.task, (batch_size, self.model.length), generator.device, tokens, torch.int64)
        if not self._has_seen_values:
            check_tokens(self.task, tokens, self.model.vocabulary)
            self._has_seen_values = True
        is_active = sample_roles(batch_size, self.model.length, generator, self.few_active)
        return TokenBatch(tokens, is_active, sample_masked(is_active, generator))

    def losses(self, batch: TokenBatch) -> TokenLosses:
        """Return the losses of a batch."""
        tokens, is_active, is_masked = batch
        masked = tokens.masked_fill(is_masked, self.model.vocabulary.mask_id)
        logits = self.model.predict(masked, is_active).logits
        error = F.cross_entropy(logits.float().movedim(-1, 1), tokens, reduction="none")
        return TokenLosses((error * is_masked).sum() / is_masked.sum())

    def total(self, losses: TokenLosses) -> Tensor:
        """Return what training minimises."""
        return losses.cross_entropy


def sample_masked(is_active: Tensor, generator: torch.Generator) -> Tensor:
    """Draw which active positions are masked (B, N) bool: a uniform number in 1..n of the n, at random.

    So every number that a regeneration of one position a step goes through is as frequent.
    """
    batch, length = is_active.shape
    count = is_active.sum(1, keepdim=True)
    masked = (uniform(batch, 1, generator) * count).long().clamp(max=count - 1) + 1
    keys = uniform(batch, length, generator) + 2.0 * ~is_active  # active positions first
    return keys.argsort(1).argsort(1) < masked
