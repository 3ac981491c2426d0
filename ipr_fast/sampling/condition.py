"""What each chain is conditioned on: tensors with a row for each chain, such as labels, embeddings or masks.

Chains move between the rows of a model's calls, and a call holds some of them. So what belongs to a chain is gathered
for the chains of a call, and passed to the model as `condition=` in the form in which the user gave it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks


class Layout(NamedTuple):
    """The form of a condition and, without its rows, the shapes and types of its tensors; hashable.

    kind: Tensor, or a type of dict or tuple. names: of a dict's values, else of their places.
    """

    kind: type
    names: tuple[Any, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        each = (f"{tuple(s)} of {str(d).removeprefix('torch.')}" for s, d in zip(self.shapes, self.dtypes, strict=True))
        if self.kind is Tensor:
            return next(each)
        keyed = issubclass(self.kind, dict)
        named = (f"{name!r}: {what}" if keyed else what for name, what in zip(self.names, each, strict=True))
        return f"a {self.kind.__name__} of {', '.join(named)}"

    def matches(self, other: Layout) -> bool:
        """Return whether another layout is the same, in whatever order the keys of a dict are."""
        if not (issubclass(self.kind, dict) and issubclass(other.kind, dict)):
            return self == other
        parts = (zip(x.names, x.shapes, x.dtypes, strict=True) for x in (self, other))
        ours, theirs = ({name: rest for name, *rest in each} for each in parts)
        return ours == theirs

    def allocate(self, rows: int, device: torch.device) -> Condition:
        """Allocate a condition of zeros."""
        each = zip(self.shapes, self.dtypes, strict=True)
        return Condition(self, tuple(torch.zeros(rows, *shape, dtype=dtype, device=device) for shape, dtype in each))


@dataclass(frozen=True)
class Condition:
    """A condition of B chains: `tensors` (B, ...) in the form of a layout."""

    layout: Layout
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: Any) -> Condition:
        """Take a condition apart: a tensor, or a dict or tuple of tensors."""
        names: tuple[Any, ...] = ("",)
        tensors: tuple[Tensor, ...] = (value,)
        if not isinstance(value, Tensor):
            names = tuple(value) if isinstance(value, dict) else tuple(range(len(value)))
            tensors = tuple(value[name] for name in names)
        kind = Tensor if isinstance(value, Tensor) else type(value)
        return cls(Layout(kind, names, tuple(t.shape[1:] for t in tensors), tuple(t.dtype for t in tensors)), tensors)

    @classmethod
    def of_chain(cls, name: str, value: object) -> Condition:
        """Take the condition of one chain, without a dimension for chains, as a single row."""
        check_form(name, value)
        parts = cls.of(value)
        layout = parts.layout._replace(shapes=tuple(tensor.shape for tensor in parts.tensors))
        return cls(layout, tuple(tensor.detach()[None] for tensor in parts.tensors))

    @property
    def value(self) -> Any:
        """The condition as the user gave it."""
        kind, names = self.layout.kind, self.layout.names
        if kind is Tensor:
            return self.tensors[0]
        if issubclass(kind, dict):
            make = OrderedDict if issubclass(kind, OrderedDict) else dict
            return make(zip(names, self.tensors, strict=True))
        return kind(*self.tensors) if hasattr(kind, "_fields") else self.tensors

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors with their names in a message."""
        names = (
            [f"condition[{name!r}]" for name in self.layout.names] if self.layout.kind is not Tensor else ["condition"]
        )
        return dict(zip(names, self.tensors, strict=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function to every tensor, which changes rows alone."""
        return Condition(self.layout, tuple(function(tensor) for tensor in self.tensors))

    def first(self, rows: int) -> Condition:
        """Return views of the first rows."""
        return self.map(lambda tensor: tensor[:rows])

    def spread(self, out: Condition) -> None:
        """Copy the only row to all rows of another condition."""
        for tensor, into in zip(self.tensors, out.tensors, strict=True):
            into.copy_(tensor.expand_as(into))

    def take(self, rows: Tensor, out: Condition) -> None:
        """Copy these rows (n,) to the first n rows of another condition."""
        for tensor, into in zip(self.tensors, out.tensors, strict=True):
            torch.index_select(tensor, 0, rows, out=into[: len(rows)])


Conditioning = Tensor | dict[str, Tensor] | tuple[Tensor, ...]  # the form in which users give one


def checked(value: object, batch: int, device: torch.device) -> Condition | None:
    """Check a user's condition for B chains on a device; None stays None."""
    if value is None:
        return None
    check_form("condition", value)
    condition = Condition.of(value)
    for name, tensor in condition.named.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}")
        if tensor.ndim == 0 or len(tensor) != batch:
            raise ValueError(f"{name} must have a row for each of the {batch} chains, got {checks.described(tensor)}")
        checks.same_device(name, tensor, device)
        if tensor.is_floating_point() and bool(tensor.isnan().any()):  # a mask of attention may hold infinities
            raise ValueError(f"{name} must have no NaN")
    return condition.map(Tensor.detach)


def check_form(name: str, value: object) -> None:
    """Raise ValueError for anything but a tensor, or a dict or tuple of tensors."""
    tensors = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else [value]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        came = ", ".join(dict.fromkeys(type(each).__name__ for each in tensors if not isinstance(each, Tensor)))
        got = f"a {type(value).__name__}" + (f" with {came or 'nothing'}" if isinstance(value, (dict, tuple)) else "")
        raise ValueError(f"{name} must be a tensor, or a dict or tuple of tensors, got {got}")


def call_arguments(condition: Condition | None) -> dict[str, Any]:
    """Return the keyword argument of a model's call; none without a condition."""
    return {} if condition is None else {"condition": condition.value}
