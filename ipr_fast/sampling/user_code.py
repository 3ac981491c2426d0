"""Calls of a user's code, models above all: what they may not do, and the errors that say so."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ipr_fast import checks


def call(name: str, iteration: int, function: Callable[..., object], *args: object) -> object:
    """Call a user's function. Raises RuntimeError, with its name and the iteration, for whatever it raises."""
    try:
        return function(*args)
    except Exception as error:
        raise RuntimeError(f"{name} raised {type(error).__name__} in iteration {iteration}: {error}") from error


@contextmanager
def unwritten(who: str, **inputs: Tensor) -> Iterator[None]:
    """Within, code of the user's may read these tensors. Raises ValueError where it has written to one.

    Tensors count the writes to themselves and to their views, so this costs nothing on the device; those that do not,
    which are made under `torch.inference_mode`, are compared with a copy.
    """
    before = {name: tensor.clone() if tensor.is_inference() else tensor._version for name, tensor in inputs.items()}
    yield
    for name, tensor in inputs.items():
        same = _same(tensor, before[name]) if tensor.is_inference() else tensor._version == before[name]
        if not same:
            raise ValueError(f"{who} writes into its input `{name}`: let it work on a copy, {name}.clone()")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def model_call(model: object, **inputs: Tensor) -> Iterator[None]:
    """Within, a model is called with these tensors: it must not write to them, and gradients need some care."""
    try:
        with unwritten(f"model: {checks.name_of(model)}", **inputs):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NEEDS_GRADIENTS):
            raise
        raise ValueError(
            f"model: {checks.name_of(model)} computes gradients, but is called without them ({error}). In the model, "
            "use `with torch.inference_mode(False), torch.enable_grad():` and clone the inputs there, before the first "
            "operation: z = patches.clone().requires_grad_()"
        ) from error


NEEDS_GRADIENTS = (
    "does not require grad",
    "Inference tensors cannot be saved for backward",
    "Setting requires_grad=True on inference tensor",
    "One of the differentiated Tensors",
)


def check_eval_mode(model: object) -> None:
    """Raise ValueError for a model that computes otherwise in training mode and is in it, or that mixes its chains.

    A module counts that reads `self.training`: dropout, batch norm, and classes of a user's own that do. A batch norm
    without running statistics takes the batch's own in either mode, so that a chain would depend on the others.
    """
    for path, module in _modules_of(model):
        where = f"its {type(module).__name__} ({path})" if path else type(module).__name__
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(f"model: {where} takes the statistics of the batch, so a chain would depend on the others")
        if module.training and _depends_on_training(module):
            raise ValueError(f"model: {where} is in training mode, in which it computes otherwise: call model.eval()")


def _modules_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a model by their paths: also those in its lists, of a function's closure, or of a partial call."""
    seen: set[int] = set()

    def within(value: object, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
        if id(value) in seen or depth > DEEPEST:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            for name, module in value.named_modules(prefix=path):
                yield name, module
                seen.add(id(module))
                yield from within(vars(module), name, depth + 1)
            return
        for name, inner in _parts_of(value):
            yield from within(inner, f"{path}.{name}" if path and name else path or name, depth + 1)

    return within(model, "", 0)


DEEPEST = 4  # objects within objects in which modules are looked for
LONGEST = 1000  # items of a list that may hold them
PLAIN = (int, float, str, bytes, type(None), Tensor, torch.dtype, torch.device, type, types.ModuleType)


def _parts_of(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds that may hold a module, with the names of attributes."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(inner, PLAIN) and not str(name).startswith("_"):
                yield str(name), inner
    elif isinstance(value, list | tuple | set):
        yield from (("", inner) for inner in value if len(value) <= LONGEST and not isinstance(inner, PLAIN))
    elif isinstance(value, functools.partial):
        yield from (("", inner) for inner in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.FunctionType):
        yield from (("", cell.cell_contents) for cell in value.__closure__ or () if _is_filled(cell))
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif hasattr(value, "__dict__"):
        yield from _parts_of(vars(value))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _depends_on_training(module: nn.Module) -> bool:
    """Whether a module reads `self.training`, or a hook of it does, and does anything with it."""
    if getattr(module, "track_running_stats", None) is False:  # a norm by a sample's own statistics in both modes
        return False
    rates = [getattr(module, name, None) for name in ("p", "dropout")]
    if any(isinstance(rate, Real) and rate == 0 for rate in rates) and type(module).__module__.startswith("torch."):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return "training" in module.code
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return _reads_training(type(module)) or any(_reads_training(type(hook)) for hook in hooks)


@functools.cache
def _reads_training(kind: type) -> bool:
    """Whether a class has a method or property that names `training`, torch's own base classes left out."""
    ours = [cls for cls in kind.__mro__ if cls not in (nn.Module, object, types.FunctionType)]
    ours = [cls for cls in ours if not cls.__module__.startswith("torch._dynamo")]
    codes = (code for cls in ours for value in vars(cls).values() for code in _codes_of(value))
    return any("training" in names for code in codes for names in _names_in(code))


def _codes_of(value: object) -> Iterator[types.CodeType]:
    """The code of a function, method or property, and of what a decorator has wrapped."""
    for name in ("fget", "__func__", "__wrapped__", "_torchdynamo_orig_callable"):
        inner = getattr(value, name, None)
        if inner is not None:
            yield from _codes_of(inner)
    if isinstance(value, types.FunctionType):
        yield value.__code__


def _names_in(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The names that a function's code uses, in functions within it too: attributes, and strings as for `getattr`."""
    yield code.co_names
    yield tuple(constant for constant in code.co_consts if constant == "training")
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)
