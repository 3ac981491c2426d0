"""Masked discrete diffusion: the vocabulary, a model's output, and the schedule by which a regeneration reveals tokens.

A sample is N tokens; some positions are active. A regeneration masks them and, in each of T steps, draws a token for
every masked active position, reveals some of these tokens, and perhaps masks others again. In step s = 0..T-1 the
visible share of the active positions rises from alpha(s / T) to alpha((s + 1) / T), and alpha(u) = u unless `remask`
says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.logits import check_temperature
from ipr_fast.sampling.remask import Remasking, remasking

REVEALS = ("count", "independent")
ORDERS = ("random", "confidence", "margin", "entropy")
NUCLEI = ("covering", "inner")
MAX_VOCABULARY = 1 << 18
ROUNDING = 1e-9  # of n alpha(u) in float64, for n up to 2**16
NUMBERS_AT_ONCE = 1 << 20  # of a table: 8 MiB a temporary tensor


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model: ids 0..size-1, the width of its logits.

    mask_id: the id of a masked position, in 0..size; `size` has no logit of its own. never: ids that are not sampled,
    such as padding; `mask_id` never is.

    Raises ValueError for ids out of range, and if no id is left to sample.
    """

    size: int
    mask_id: int
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.integer("size", self.size, 1, MAX_VOCABULARY)
        checks.integer("mask_id", self.mask_id, 0, self.size)
        if not isinstance(self.never, tuple | list):
            raise ValueError(f"never must be a tuple of ids, got {self.never!r}")
        for token in self.never:
            checks.integer("never", token, 0, self.size)
        object.__setattr__(self, "never", tuple(self.never))
        if len(self.forbidden) == self.size:
            raise ValueError(f"never and mask_id must leave a token to sample, got a vocabulary of {self.size} tokens")

    @property
    def forbidden(self) -> tuple[int, ...]:
        """The ids below `size` that are not sampled, ascending."""
        return tuple(sorted({int(token) for token in (*self.never, self.mask_id) if token < self.size}))

    def forbidden_on(self, device: torch.device) -> Tensor | None:
        """Return which ids (size,) bool are not sampled, on a device; None where all are."""
        if not self.forbidden:
            return None
        ids = torch.tensor(self.forbidden, device=device)
        return torch.zeros(self.size, dtype=torch.bool, device=device).index_fill_(0, ids, True)


@dataclass(frozen=True)
class TokenPositions:
    """The positions of a sample of N tokens, which masks and policies call patches."""

    length: int

    @property
    def num_patches(self) -> int:
        return self.length

    @property
    def patch_numel(self) -> int:
        return 1

    @property
    def grid_shape(self) -> tuple[int]:
        return (self.length,)

    @property
    def grid_h(self) -> int:
        return 1

    @property
    def grid_w(self) -> int:
        return self.length


class TokenPrediction(NamedTuple):
    """A token model's output for n positions per chain: all N of them, or the A active slots.

    logits  (B, n, V)  of the token at the position; of any floating-point type
    quality (B, n)     the model's own rating of the token that stands there, higher if it is better, or None
    """

    logits: Tensor
    quality: Tensor | None = None


def check_prediction(
    value: object, shape: tuple[int, int, int], device: torch.device, wanted: Tensor | None = None
) -> None:
    """Raise ValueError unless a model returned a TokenPrediction with logits of shape (B, A, V) on the device.

    wanted (B, W): slots whose logits alone the model may return.
    """
    if not isinstance(value, TokenPrediction):
        raise ValueError(f"model must return a TokenPrediction, got {type(value).__name__}")
    whole, logits = shape, value.logits
    if wanted is not None and isinstance(logits, Tensor) and logits.shape[1:2] == wanted.shape[1:]:
        shape = (shape[0], wanted.shape[1], shape[2])
    for name, field, expected in (("logits", logits, shape), ("quality", value.quality, whole[:2])):
        if field is None and name == "quality":
            continue
        if not isinstance(field, Tensor) or tuple(field.shape) != expected or not field.is_floating_point():
            came = checks.described(field)
            raise ValueError(f"model must return floating-point {name} of shape {expected}, got {came}")
        checks.same_device(f"model: its {name}", field, device)
    if shape[2] > 1 and value.logits.stride(2) != 1:
        raise ValueError(f"model must return logits with contiguous rows, got strides {value.logits.stride()}")


def rating(prediction: TokenPrediction) -> Tensor:
    """Return a prediction's quality (B, n), float32, a NaN as 0. Raises ValueError if the model has none."""
    if prediction.quality is None:
        raise ValueError('model must return the quality of tokens for remask="quality", got None')
    return prediction.quality.detach().float().nan_to_num(nan=0.0).contiguous()


class TokenTables(NamedTuple):
    """A schedule's numbers for every number of active positions n = 0..N, padded to the largest T.

    steps   (N + 1,) int32      T
    visible (N + 1, T) int32    active positions that are visible after step s; of `count`, else None
    reveal  (N + 1, T) float32  probability of revealing a masked position in step s; of `independent`, else None
    sigma   (N + 1, T) float32  probability of remasking a visible one in step s; None without remasking
    """

    steps: Tensor
    visible: Tensor | None
    reveal: Tensor | None
    sigma: Tensor | None

    def to(self, device: torch.device) -> TokenTables:
        rest = (None if table is None else table.to(device) for table in self[1:])
        return TokenTables(self.steps.to(device), *rest)


@dataclass(frozen=True)
class TokenSchedule:
    """How a regeneration of n active positions draws and reveals tokens.

    steps: T >= 1, the model calls; None for one position a step, T = n. Without remasking "count" takes no more than n.
    reveal: "count" reveals so many positions in step s that floor(n alpha((s + 1) / T)) are visible after it, those
        that come first in `order`. "independent" reveals each masked position with probability
        (alpha' - (1 - sigma) alpha) / (1 - alpha), in no order; with sigma = 0 there for "conf".
    order: "random"; "confidence", the highest probability of the drawn token; "margin", the largest difference of
        the two highest probabilities; "entropy", the lowest entropy. Probabilities are untempered; ties go to the
        lowest position.
    remask: None, a strategy of `ipr_fast.sampling.remask`, or its name: "cap", "rescale", "conf", "loop",
        "forward_backward", or "quality", for models that rate tokens.
    temperature: tau, which divides the logits: 0, which takes the most probable token, or from 1e-6 to 1e6, which takes
        all tokens alike.
    top_k: only the k most probable tokens; None for all. top_p: only the most probable tokens that cover a probability
        p in (0, 1] of the tempered law. Tokens as probable as the last one stay in.
    nucleus: whether the token that crosses p is in ("covering"), or not ("inner", as in ReMDM's code; the first is).

    Raises ValueError, naming the field. Sources: Sahoo et al. 2024 (MDLM), Nie et al. 2025 (LLaDA: "count" by
    "confidence"), Wang et al. 2025 (ReMDM).
    """

    steps: int | None = None
    reveal: str = "count"
    order: str = "confidence"
    remask: Remasking | str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    nucleus: Literal["covering", "inner"] = "covering"

    def __post_init__(self) -> None:
        for name, choices in (("reveal", REVEALS), ("order", ORDERS), ("nucleus", NUCLEI)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("steps", "top_k"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        check_temperature(self.temperature)
        if not checks.number("top_p", self.top_p, 0, 1) > 0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        object.__setattr__(self, "remask", remasking(self.remask))

    @property
    def remasking(self) -> Remasking | None:
        """`remask`, as a strategy."""
        return remasking(self.remask)

    def num_steps(self, num_active: int) -> int:
        """Return T for `num_active` active positions; 0 for none."""
        if self.steps is None:
            return num_active
        fewer = self.reveal == "count" and self.remasking is None
        return min(self.steps, num_active) if fewer or not num_active else self.steps

    def tables(self, num_positions: int) -> TokenTables:
        """Tabulate the schedule for every number of active positions from 0 to `num_positions`."""
        counts = torch.arange(num_positions + 1, device="cpu")
        steps = torch.tensor([self.num_steps(n) for n in range(num_positions + 1)], device="cpu")
        longest = int(steps.max())
        few = max(1, NUMBERS_AT_ONCE // max(1, longest))
        parts = [self._rows(*each, longest) for each in zip(counts.split(few), steps.split(few), strict=True)]
        joined = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        return TokenTables(steps.int(), *joined)

    def _rows(self, counts: Tensor, steps: Tensor, longest: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the rows of `TokenTables` for these numbers of active positions, but for their steps."""
        step, total, strategy = torch.arange(longest, device="cpu"), steps.clamp_min(1)[:, None], self.remasking
        visible = counts[:, None] * (step + 1).minimum(total) // total  # floor(n alpha), exactly, where alpha(u) = u
        if self.reveal == "count" and strategy is None:
            return visible.int(), None, None
        begun, ended = (((step + k).double() / total).clamp(max=1) for k in (0, 1))
        shares = strategy or Remasking()
        before, after = shares.visible(begun), shares.visible(ended)
        sigma = None if strategy is None else strategy.sigma(begun, before, after)
        remasked = None if sigma is None else sigma.float()
        if self.reveal == "count":
            if type(shares).visible is not Remasking.visible:
                visible = (counts[:, None] * after + ROUNDING).floor()
            return visible.int(), None, remasked
        replaced = 0.0 if sigma is None or shares.by_confidence else sigma * before  # of ReMDM's code: none for "conf"
        revealed = (after - before + replaced) / (1 - before).clamp_min(ROUNDING)
        return None, revealed.clamp(0, 1).float(), remasked


@dataclass(frozen=True)
class TokenSampling:
    """The sampling settings of a call on tokens."""

    schedule: TokenSchedule
    seed: int = 0
    fixed_noise: ClassVar[bool] = False  # a mask is no noise

    def num_steps(self, num_active: int) -> int:
        """Return the steps of one regeneration of `num_active` positions."""
        return self.schedule.num_steps(num_active)
