"""Masked language models of Hugging Face's `transformers` as TokenDenoisers.

`transformers` is not imported: a model is an nn.Module with a `config`, called as model(input_ids=tokens), that returns
logits (B, N, V) or an output with `logits`. How the projects call their models beyond that is a `Convention`:

    masked_lm  AutoModelForMaskedLM: an attention mask (B, N)
    llada      LLaDA: likewise; no time
    dream      Dream and DiffuCoder: logits of the next position; an attention mask (B, 1, N, N) and positions
    mdlm       MDLM: a time, which the published models ignore; no attention mask; logits also of the mask

Sources: Nie et al. 2025, `generate.py` of ML-GSAI/LLaDA; Ye et al. 2025, `generation_utils.py` of Dream-org's models;
Gong et al. 2025, apple/ml-diffucoder; Sahoo et al. 2024, `modeling_mdlm.py` of kuleshov-group's models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.tokens import TokenPrediction, Vocabulary

LENGTHS = ("max_position_embeddings", "max_sequence_length", "model_length", "n_positions")  # names in configurations
LEAST_ALPHA = 1e-3  # of MDLM's noise: sigma = -log(1 - (1 - LEAST_ALPHA) t)


@dataclass(frozen=True)
class Convention:
    """How a model is called, and which position its logits are of.

    shift: the logits at i - 1 are those of position i; position 0 reads its own.
    attention: the `attention_mask` where there is padding: "keys" is (B, N) int64; "pairs" is (B, 1, N, N) bool, with
        `position_ids` (B, N) that count from the first token that is not padding; None for a model without one.
    timesteps: it takes `timesteps` (B,), sigma = -log(1 - 0.999 t) of the share t of masked positions.
    generates_special: it generates special tokens, such as the end of a text; only padding and unknown are forbidden.
    """

    shift: bool = False
    attention: Literal["keys", "pairs"] | None = "keys"
    timesteps: bool = False
    generates_special: bool = True


CONVENTIONS = {
    "masked_lm": Convention(generates_special=False),
    "llada": Convention(),
    "dream": Convention(shift=True, attention="pairs"),
    "mdlm": Convention(attention=None, timesteps=True),
}


class HuggingFaceDenoiser(nn.Module):
    """A model of `transformers` as a TokenDenoiser of sequences of `length` tokens.

    model: in evaluation mode. Its weights stay where they are, in their dtype.
    tokenizer: tells mask, padding, special ids and the ids beyond it, which are not sampled; without one, the model's
        configuration does.
    convention: a `Convention` or its name, "masked_lm", "llada", "dream" or "mdlm"; by default that of
        `model.config.model_type`, else "masked_lm".
    prompt_length: the first positions that are given, the same number in every row: pass them as `known`.
    guidance: scale >= 0 of classifier-free guidance, logits un + (guidance + 1) (cond - un), un with a masked prompt.
        Needs a prompt, and twice the work.
    padded: rows have padding, which is not attended to: every position with the id of padding if that is never sampled,
        else (LLaDA and Dream also generate it, as the end of a text) the beginning of a prompt. Pass it as `known`.
        Many models look at their attention mask on the host, which a CUDA graph does not allow: `backend="torch"`.
    mask_id, pad_id, never: ids of mask and padding and the ids not to be sampled, in place of those found.

    The `condition` of a call is a dict of further inputs of the model, with a row for each chain: embeddings of a text
    to attend to, for instance.

    The last layer, as large as the vocabulary, is computed for active positions only, if it is the Linear layer that
    `model.get_output_embeddings()` returns and the model is not compiled.

    Raises ValueError, naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        *,
        tokenizer: Any = None,
        convention: Convention | str | None = None,
        prompt_length: int = 0,
        guidance: float = 0.0,
        padded: bool = False,
        mask_id: int | None = None,
        pad_id: int | None = None,
        never: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or config is None:
            raise ValueError(f"model must be an nn.Module with a `config`, got {checks.described(model)}")
        self.model, self.training = model, model.training
        self.length = checks.integer("length", length, 1, _longest(config, tokenizer))
        self.convention = _convention(convention, config)
        self.prompt_length = checks.integer("prompt_length", prompt_length, 0, self.length)
        self.guidance = checks.number("guidance", guidance, 0)
        if self.guidance and not self.prompt_length:
            raise ValueError(f"guidance needs a prompt to mask: a prompt_length >= 1, got {prompt_length}")
        self.vocabulary = _vocabulary(model, tokenizer, self.convention, mask_id, pad_id, never)
        self.pad_id = _token("pad", tokenizer, config) if pad_id is None else pad_id
        self.padded, self.pads_anywhere = checks.boolean("padded", padded), self.pad_id in self.vocabulary.forbidden
        if self.padded:
            self._check_padding()

    def forward(
        self, tokens: Tensor, active: ActivePatches | None = None, *, condition: dict[str, Tensor] | None = None
    ) -> TokenPrediction:
        """Predict the tokens of the active slots, by default of all positions."""
        if active is None:
            active = ActivePatches.from_mask(torch.ones_like(tokens, dtype=torch.bool))
        active = active.narrowed()  # logits do not depend on what else is active
        inputs = self._inputs(tokens)
        if condition is not None:
            if not isinstance(condition, dict) or not condition.keys().isdisjoint({"input_ids", *inputs}):
                own = ", ".join(("input_ids", *inputs))
                raise ValueError(f"condition must be a dict of the model's inputs other than {own}")
            inputs |= condition
        if not self.guidance:
            return TokenPrediction(self._logits(tokens, active, inputs))
        unprompted = tokens.clone()
        unprompted[:, : self.prompt_length] = self.vocabulary.mask_id
        twice = ActivePatches(active.index.repeat(2, 1), active.count.repeat(2))
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        logits = self._logits(torch.cat([tokens, unprompted]), twice, inputs)
        given, un = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        return TokenPrediction(un + (self.guidance + 1) * (given - un))

    def padding(self, tokens: Tensor) -> Tensor:
        """Return which positions (B, N) bool are padding, in rows that have some."""
        assert self.pad_id is not None, "rows have padding"
        is_pad = tokens == self.pad_id
        if self.pads_anywhere:
            return is_pad
        within = torch.arange(self.length, device=tokens.device) < self.prompt_length
        return (is_pad & within).long().cumprod(1).bool()

    def _check_padding(self) -> None:
        if self.convention.attention is None:
            raise ValueError("padded must be False for a model that takes no attention mask, got True")
        if self.pad_id is None:
            raise ValueError("padded needs a pad_id: neither the tokenizer nor the model's configuration has one")
        if not self.pads_anywhere and not self.prompt_length:
            raise ValueError(f"padded needs a prompt_length >= 1: {self.pad_id}, the id of padding, is also sampled")

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the inputs of a call beside the tokens."""
        inputs = {}
        if self.padded:
            attended = ~self.padding(tokens)
            if self.convention.attention == "pairs":
                inputs["attention_mask"] = attended[:, None, None, :].expand(-1, 1, self.length, -1)
                inputs["position_ids"] = (attended.cumsum(1) - 1).clamp(min=0)
            else:
                inputs["attention_mask"] = attended.long()
        if self.convention.timesteps:
            share = (tokens == self.vocabulary.mask_id).float().mean(1)
            inputs["timesteps"] = -torch.log1p(-(1 - LEAST_ALPHA) * share)
        return inputs

    def _logits(self, tokens: Tensor, active: ActivePatches, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits (B, A, V) of the slots."""
        if self.convention.shift:
            active = ActivePatches(torch.where(active.index > 0, active.index - 1, active.index), active.count)
        with _at_slots(_head(self.model), tokens.shape, active) as gathered:
            output = self.model(input_ids=tokens, **inputs)
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        slots = active.index.shape[1] if gathered else self.length
        expected = (len(tokens), slots, self.vocabulary.size)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            name, came = checks.name_of(self.model), checks.described(logits)
            raise ValueError(f"model: {name} must return logits of shape {expected}, got {came}")
        return logits if gathered else active.gather(logits)


# ------------------------------------------------------------------------------------------------------ the last layer


def _head(model: nn.Module) -> nn.Linear | None:
    """Return the layer that computes the logits; None where it is not known or its hooks would be compiled."""
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    head = None if compiled else _output_layer(model)
    return head if isinstance(head, nn.Linear) else None


def _output_layer(model: nn.Module) -> object:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def _at_slots(head: nn.Linear | None, shape: torch.Size, active: ActivePatches) -> Iterator[list[bool]]:
    """Let a layer see the active slots only of its input (B, N, ...). Yields a list that is not empty once it has."""
    gathered: list[bool] = []

    def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden, *rest = arguments
        if hidden.shape[:2] != shape:
            return None
        gathered.append(True)
        return active.gather(hidden), *rest

    if head is None:
        yield gathered
        return
    handle = head.register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------ settings


def _convention(convention: object, config: Any) -> Convention:
    if isinstance(convention, Convention):
        return convention
    if convention is None:
        return CONVENTIONS.get(str(getattr(config, "model_type", "")).lower(), CONVENTIONS["masked_lm"])
    if not isinstance(convention, str) or convention not in CONVENTIONS:
        raise ValueError(f"convention must be a Convention or one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return CONVENTIONS[convention]


def _longest(config: Any, tokenizer: Any) -> int | None:
    """Return the longest sequence that a model takes, where it is known."""
    limits = [getattr(config, name, None) for name in LENGTHS] + [getattr(tokenizer, "model_max_length", None)]
    return min((int(limit) for limit in limits if limit and limit > 0), default=None)


def _token(kind: str, tokenizer: Any, config: Any) -> int | None:
    """Return the id of a kind of special token; None if there is none."""
    for source in (config,) if tokenizer is None else (tokenizer, config):
        found = getattr(source, f"{kind}_token_id", None)
        if isinstance(found, (list, tuple)):  # a configuration may have several ends
            found = found[0] if found else None
        if found is not None:
            return int(found)
    return None


def _vocabulary(
    model: nn.Module,
    tokenizer: Any,
    convention: Convention,
    mask_id: int | None,
    pad_id: int | None,
    never: Iterable[int] | None,
) -> Vocabulary:
    config: Any = model.config
    head = _output_layer(model)
    size = head.out_features if isinstance(head, nn.Linear) else getattr(config, "vocab_size", None)
    if size is None:
        raise ValueError(f"model: the configuration of {checks.name_of(model)} must have a vocab_size")
    if mask_id is None:
        mask_id = _token("mask", tokenizer, config)
    if mask_id is None and convention.timesteps:  # MDLM puts the mask behind a tokenizer that has none
        mask_id = size - 1
    if mask_id is None:
        raise ValueError("mask_id must be given: neither the tokenizer nor the model's configuration has one")
    read_in: Any = getattr(model, "get_input_embeddings", None)
    embedding = read_in() if callable(read_in) else None
    if isinstance(embedding, nn.Embedding):
        checks.integer("mask_id", mask_id, 0, embedding.num_embeddings - 1)
    if pad_id is not None:
        checks.integer("pad_id", pad_id, 0, size - 1)
    if never is None:
        found = {kind: _token(kind, tokenizer, config) for kind in ("pad", "unk", "bos", "eos", "cls", "sep")}
        found["pad"] = found["pad"] if pad_id is None else pad_id
        ends = {found.pop(kind) for kind in ("bos", "eos", "cls", "sep")}
        special = set(found.values()) - ends if convention.generates_special else {*found.values(), *ends}
        beyond = range(size if tokenizer is None else len(tokenizer), size)
        never = {*beyond, *(token for token in special if token is not None and token < size)}
    return Vocabulary(size, mask_id, tuple(sorted(never)))
