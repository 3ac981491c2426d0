"""Classifier-free guidance: a model with and without its condition, in one batch.

    velocity = without + scale (with - without)      of patches; the logits of tokens likewise

Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; for tokens Nie et al. 2025, with scale - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.models import contract
from ipr_fast.sampling.condition import Condition, Conditioning, Layout
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction, patch_dtype
from ipr_fast.sampling.tokens import TokenPrediction

OPTIONAL = ("generate_schedule", "refine_schedule", "value_range", "mix_bounds", "preserves_variance")


class Guided(nn.Module):
    """A Denoiser or TokenDenoiser that is moved along the difference that its condition makes.

    model: its calls take `condition=`. scale: >= 0; 1 is the model with its condition, 0 without, more goes beyond.
    unconditional: the condition that means none, in the form of a chain's, such as `torch.tensor(10)` for a label; by
        default the model's attribute `unconditional`.

    Each row is computed twice. The variance mix, the log-variance and the quality are those with the condition.
    Raises ValueError, naming the argument.
    """

    def __init__(self, model: Any, scale: float, unconditional: Conditioning | None = None) -> None:
        super().__init__()
        contract.condition(model, given=True)
        self.model, self.scale = model, checks.number("scale", scale, 0)
        required = ("vocabulary", "length") if contract.is_token_denoiser(model) else ("grid",)
        for name in (*required, *(name for name in OPTIONAL if hasattr(model, name))):
            setattr(self, name, getattr(model, name))
        if unconditional is None:
            unconditional = getattr(model, "unconditional", None)
        if unconditional is None:
            raise ValueError(f"unconditional must be given, as {checks.name_of(model)} has no attribute of that name")
        none = Condition.of_chain("unconditional", unconditional)
        self._layout = none.layout
        for number, (name, tensor) in enumerate(zip(none.layout.names, none.tensors, strict=True)):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                where = f"unconditional[{name!r}]" if len(none.tensors) > 1 else "unconditional"
                raise ValueError(f"{where} must have no NaN")
            on = contract.device_of(model) or tensor.device
            self.register_buffer(f"unconditional_{number}", tensor.to(on), persistent=False)

    def forward(
        self, values: Tensor, *levels_active: Any, condition: Conditioning, context: Any = None, table: Any = None
    ) -> Prediction | TokenPrediction:
        """Predict, as the model does: (patches, levels, active) or (tokens, active)."""
        prepared = {} if context is None else {"context": context.pairs}
        prepared |= {} if table is None else {"table": table}
        arguments = (None if each is None else _twice(each) for each in levels_active)
        both = self.model(_twice(values), *arguments, condition=self._both(condition), **prepared)
        given, without = (type(both)(*(None if field is None else field[row::2] for field in both)) for row in (0, 1))
        if isinstance(both, Prediction):
            return given._replace(velocity=self._guided(given.velocity, without.velocity))
        return given._replace(logits=self._guided(given.logits, without.logits))

    @property
    def layout(self) -> Layout:
        """The form that chains' conditions must have; its types follow a cast of this module."""
        names = range(len(self._layout.names))
        return self._layout._replace(dtypes=tuple(getattr(self, f"unconditional_{name}").dtype for name in names))

    @property
    def patch_dtype(self) -> torch.dtype:
        """The type in which the model takes patches."""
        return patch_dtype(self.model)

    @property
    def prepare(self) -> Callable[..., Pairs] | None:
        """The model's `prepare`, of both rows; None where it has none."""
        return self._prepare if contract.prepares(self.model) else None

    @property
    def tabulate(self) -> Callable[..., Any] | None:
        """The model's `tabulate`; None where it has none."""
        return self.model.tabulate if contract.tabulates(self.model) else None

    def _prepare(
        self,
        values: Tensor,
        active: ActivePatches,
        out: Pairs | None = None,
        *,
        condition: Conditioning,
        table: Any = None,
    ) -> Pairs:
        options = {} if out is None else {"out": out.pairs}
        options |= {} if table is None else {"table": table}
        if contract.prepare_takes_condition(self.model):
            options["condition"] = self._both(condition)
        made = self.model.prepare(_twice(values), _twice(active), **options)
        return out if out is not None and made is out.pairs else Pairs(made)

    def _guided(self, given: Tensor, without: Tensor) -> Tensor:
        """Return without + scale (given - without); at `without` = -inf that for a scale below 1, else `given`."""
        given, without = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (given, without))
        if not self.scale:
            return without
        at_infinity = given if self.scale >= 1 else without
        return torch.where(without == -torch.inf, at_infinity, without + self.scale * (given - without))

    def _both(self, condition: Conditioning) -> Any:
        """Return the condition of both rows of each chain."""
        given = Condition.of(condition)
        if not self.layout.matches(given.layout):
            raise ValueError(f"unconditional must be like a chain's condition, {given.layout}, got {self.layout}")
        places = (self.layout.names.index(name) for name in given.layout.names)
        without = (getattr(self, f"unconditional_{place}") for place in places)
        pairs = (
            torch.stack([tensor, none.expand_as(tensor)], 1)
            for tensor, none in zip(given.tensors, without, strict=True)
        )
        return Condition(given.layout, tuple(pair.flatten(0, 1) for pair in pairs)).value


class Pairs:
    """The context of twice as many rows, with the model's `first` if it has one."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs
        if hasattr(pairs, "first"):
            self.first = lambda chains: Pairs(pairs.first(2 * chains))


def _twice(value: Any) -> Any:
    """Repeat each row: a chain's two rows lie beside each other, so that the first chains have the first rows."""
    if isinstance(value, ActivePatches):
        wanted = None if value.wanted is None else _twice(value.wanted)
        return ActivePatches(_twice(value.index), _twice(value.count), value.whole, wanted)
    return torch.stack([value, value], 1).flatten(0, 1)
