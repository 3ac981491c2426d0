"""The log-likelihood of sequences under a causal language model of Hugging Face's `transformers`: a reward for text.

`transformers` is not imported: a model is an nn.Module with a `config`, called as model(input_ids=tokens), that returns
logits (B, N, V), or an output with `logits`, of the next position each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.sampling import user_code


class Likelihood:
    """log p(x) of tokens (B, N) under another model, in nats: (B,) float64, for `Metropolis`, guidance and `--accept`.

    model: in evaluation mode; its weights stay where they are. Tokens are moved to their device.
    prompt_length: the first tokens that are given: log p(x | prompt). Without one and without a start_id it is one
        token, as a causal model has no law for the first.
    start_id: a token to put before the sequence, such as a tokenizer's `bos_token_id`.
    pad_id: tokens with this id after the last other one are not counted.
    mean: divide by the number of tokens that are counted, so that sequences of different lengths compare.
    translate: for a model with another tokenizer, a function of tokens (B, N) int64 that returns its tokens (B, M)
        int64, padded on the right with its pad_id. prompt_length counts its tokens.
    rows: how many sequences the model computes at a time; its logits take rows * M * V numbers.

    Raises ValueError, naming the argument; at a call for tokens that the model does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prompt_length: int = 0,
        start_id: int | None = None,
        pad_id: int | None = None,
        mean: bool = False,
        translate: Callable[[Tensor], Tensor] | None = None,
        rows: int = 64,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise ValueError(f"model must be an nn.Module with a `config`, got {checks.described(model)}")
        if translate is not None and not callable(translate):
            raise ValueError(f"translate must be callable, got {type(translate).__name__}")
        self.model, self.translate = model, translate
        self.size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        for name, value in (("start_id", start_id), ("pad_id", pad_id)):
            if value is not None:
                checks.integer(name, value, 0, self.size - 1)
        self.start_id, self.pad_id = start_id, pad_id
        self.prompt_length = checks.integer("prompt_length", prompt_length, 0)
        self.mean, self.rows = checks.boolean("mean", mean), checks.integer("rows", rows, 1)

    def __repr__(self) -> str:
        return f"Likelihood({type(self.model).__name__})"

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        user_code.check_eval_mode(self.model)
        tokens = self._translated(tokens)
        counted = self._counted(tokens)
        if self.start_id is not None:
            tokens = torch.cat([tokens.new_full((len(tokens), 1), self.start_id), tokens], 1)
        parts = [self._log_probabilities(part) for part in tokens.split(self.rows)] if len(tokens) else []
        found = torch.cat(parts) if parts else counted[:, 1:].double()
        counted = counted[:, counted.shape[1] - found.shape[1] :]
        total = found.masked_fill(~counted, 0.0).sum(1)
        return total / counted.sum(1).clamp_min(1) if self.mean else total

    def _translated(self, tokens: Tensor) -> Tensor:
        """Return the model's tokens (B, M), on its device."""
        found: Any = tokens if self.translate is None else self.translate(tokens)
        if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.shape[:-1] != tokens.shape[:1]:
            name = "tokens" if self.translate is None else "translate"
            raise ValueError(f"{name} must be int64 ({len(tokens)}, M), got {checks.described(found)}")
        if len(found) and found.shape[1] <= self.prompt_length:
            raise ValueError(
                f"prompt_length must be less than the {found.shape[1]} tokens of a sequence, got {self.prompt_length}"
            )
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < self.size):
            raise ValueError(
                f"tokens must be in 0..{self.size - 1} for {type(self.model).__name__}, got "
                f"{int(found.min())}..{int(found.max())}; translate= gives those of another tokenizer"
            )
        parameter = next(self.model.parameters(), None)
        return found if parameter is None else found.to(parameter.device)

    def _counted(self, tokens: Tensor) -> Tensor:
        """Return which tokens (B, M) count."""
        counted = torch.arange(tokens.shape[1], device=tokens.device) >= self.prompt_length
        counted = counted.expand(tokens.shape)
        if self.pad_id is None:
            return counted
        is_text = tokens != self.pad_id
        return counted & (is_text.flip(1).cumsum(1).flip(1) > 0)

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        """Return log p (R, M - 1) float64 of all tokens (R, M) but the first, each given those before it."""
        output = self.model(input_ids=tokens)
        logits = getattr(output, "logits", output)
        expected = (*tokens.shape, self.size)
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.shape[2] < self.size:
            raise ValueError(f"model must return logits of shape {expected}, got {checks.described(logits)}")
        flat = logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
        return -nn.functional.cross_entropy(*flat, reduction="none").view(len(tokens), -1).double()
