"""The protocol of a model of tokens: `TokenDenoiser`."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.tokens import TokenPrediction, Vocabulary


@runtime_checkable
class TokenDenoiser(Protocol):
    """A model of masked discrete diffusion: a callable with a `vocabulary` and a `length`.

    `model(tokens, active)` gets tokens (B, N) int64, of which masked ones are `vocabulary.mask_id`, and returns the
    TokenPrediction of the active slots, logits (B, A, V): slot a of row b is position `active.index[b, a]`, and the
    logits are those of the token at that position. A row may have fewer than A active positions, down to none: its
    last slots are padding, with index -1, whose logits are ignored. An active position may hold a token already, once
    a step has revealed it; its logits are ignored. Where `active.wanted` (B, W) lists the slots that are not, the model
    may return logits (B, W, V) of these alone. Positions in no slot keep their tokens. The engine never samples
    `mask_id` and the ids of `vocabulary.never`, whatever their logits.

    `quality` (B, A), of a model that rates tokens (PRISM, Kim et al. 2025), is that of the token that a slot holds, the
    higher the better; `TokenSchedule(remask="quality")` masks the worst again. A masked slot's is ignored.

    A model that takes a time computes it from the tokens: the share of the N positions that are masked.

    What a `Denoiser` may rely on and must heed holds here as well: a row is computed from that row's inputs alone,
    inputs are read only, the model is in evaluation mode, calls have no gradients and do not wait on the host.

    Optional:

    - a keyword argument `condition` of calls, and of `prepare`: as for a `Denoiser`.
    - `generate_schedule` and `refine_schedule` (`ipr_fast.TokenSchedule`): the defaults of the calls.
    - `prepare(tokens, active, out=None)` and a keyword argument `context` of calls: as for `ContextDenoiser`, with the
      active positions masked.
    - `tabulate(levels, out=None)` and a keyword argument `table` of calls: as for `TableDenoiser`, at the levels of a
      position, 0 where a token is visible and 1 where it is masked.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of tokens, and of the mask."""
        ...

    @property
    def length(self) -> int:
        """N, the number of positions."""
        ...

    def __call__(self, tokens: Tensor, active: ActivePatches, **options: Any) -> TokenPrediction: ...
