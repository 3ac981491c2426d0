"""Detects changes to a model that invalidate a captured CUDA graph: weight addresses, module structure, attributes.

Not detected: variables that a function has closed over, and attributes nested deeper than DEEPEST objects. New values
written into a weight need no detection, since a graph reads them.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

DEEPEST = 4
PLAIN = (Number, str, bytes, torch.dtype, torch.device, torch.Size, type(None), type)

Alive = list[Callable[[], object]]


class Fingerprint(NamedTuple):
    """The state of a model that a graph depends on.

    values: what is compared. alive: weak references to objects compared by id; if one is dead (None), its id may have
    been reused.
    """

    values: Hashable
    alive: Alive

    def equals(self, other: Fingerprint) -> bool:
        """Return whether graphs captured in one state are valid in the other."""
        return self.values == other.values and all(each() is not None for each in (*self.alive, *other.alive))


def fingerprint(model: object) -> Fingerprint:
    """Take the fingerprint of a module with all modules within it, or of another object's attributes."""
    alive: Alive = []
    if not isinstance(model, nn.Module):
        return Fingerprint(_value(getattr(model, "__dict__", None), alive, 0), alive)
    modules = model.named_modules(remove_duplicate=False)  # sharing a module is part of the structure
    values = tuple((name, type(module), _value(_attributes(module), alive, 0)) for name, module in modules)
    return Fingerprint(values, alive)


def _attributes(module: nn.Module) -> dict[str, object]:
    """Return a module's attributes without child modules and, to save time, empty containers."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "_modules" and not (isinstance(value, (dict, set)) and not value)
    }


def _value(value: object, alive: Alive, depth: int) -> Hashable:
    """Return what to compare of a value; by its id, which is added to `alive`, if there is nothing better."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor) and value.layout == torch.strided:
        if value.device.type == "cpu" and value.numel() <= 16:  # the host may read it
            return tuple(value.flatten().tolist()), value.dtype, tuple(value.shape)
        return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_value(item, alive, depth) for item in value)
    if isinstance(value, dict):
        return tuple((_value(name, alive, depth), _value(item, alive, depth)) for name, item in value.items())
    if isinstance(value, types.MethodType):  # each access makes another object
        return "method", _value(value.__func__, alive, depth), id(value.__self__)
    alive.append(_reference(value))
    attributes = getattr(value, "__dict__", None)
    inside = () if depth >= DEEPEST or not isinstance(attributes, dict) else _value(attributes, alive, depth + 1)
    return id(value), inside


def _reference(value: object) -> Callable[[], object]:
    """Return a weak reference if the type allows it, else a strong one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
