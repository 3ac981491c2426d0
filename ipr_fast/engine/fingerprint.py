"""What of a model a captured graph holds as it was: where its weights are, its structure, its plain attributes."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

DEEPEST = 4  # objects within objects that are looked into
PLAIN = (Number, str, bytes, torch.dtype, torch.device, torch.Size, type(None), type)


class Fingerprint(NamedTuple):
    """Two of a model are equal unless something has changed that a graph may hold.

    parts: what is compared. alive: of objects that are told apart by their identity alone, whether each is still there;
    an identity is another object's after that.
    """

    parts: Hashable
    alive: tuple[Callable[[], object], ...]

    def equals(self, other: Fingerprint) -> bool:
        return self.parts == other.parts and all(each() is not None for each in (*self.alive, *other.alive))


def fingerprint(model: object) -> Fingerprint:
    """Of a module and all within it, or of another object's attributes.

    Values that change in place within a weight make no difference: a graph reads them anew. Neither do those that a
    function has closed over, nor objects beyond a few levels of nesting, which nobody can tell.
    """
    alive: list[Callable[[], object]] = []
    if not isinstance(model, nn.Module):
        return Fingerprint(_of(getattr(model, "__dict__", None), alive, 0), tuple(alive))
    modules = model.named_modules(remove_duplicate=False)  # a module in two places is two parts of the structure
    parts = tuple((name, _of(type(module), alive, 0), _of_module(module, alive)) for name, module in modules)
    return Fingerprint(parts, tuple(alive))


def _of_module(module: nn.Module, alive: list) -> Hashable:
    """Its own attributes, without the many containers that are mostly empty, and the modules, whose turn comes."""
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name != "_modules" and not (isinstance(value, (dict, set)) and not value)
    }
    return _of(attributes, alive, 0)


def _of(value: object, alive: list, depth: int) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor) and value.layout == torch.strided:
        if value.device.type == "cpu" and value.numel() <= 16:
            return tuple(value.flatten().tolist()), value.dtype, tuple(value.shape)
        return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_of(item, alive, depth) for item in value)
    if isinstance(value, dict):
        return tuple((_of(name, alive, depth), _of(item, alive, depth)) for name, item in value.items())
    if isinstance(value, types.MethodType):  # a new object at each look
        return "method", _of(value.__func__, alive, depth), id(value.__self__)
    alive.append(_reference(value))
    attributes = getattr(value, "__dict__", None)
    inside = () if depth >= DEEPEST or not isinstance(attributes, dict) else _of(attributes, alive, depth + 1)
    return id(value), inside


def _reference(value: object) -> Callable[[], object]:
    """Gives the value while it is there; keeps it there only if there is no other way to know."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
