"""Runs user code: names it in errors, detects writes to inputs and training mode."""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ipr_fast import checks
from ipr_fast.errors import UserCodeError


def call(
    name: str, iteration: int | Tensor, function: Callable[..., object], *args: object, unit: str = "iteration"
) -> object:
    """Call a user's function in an iteration. Raises UserCodeError, with its name, for any exception of its own.

    unit: what the number `iteration` counts, if that is not iterations.
    """
    try:
        return function(*args)
    except Exception as error:
        raise UserCodeError(f"{name} raised {type(error).__name__} in {unit} {iteration}: {error}") from error


@contextmanager
def errors_as_value_error(name: str) -> Iterator[None]:
    """Turn any exception of user code into a ValueError with its name, as for other bad input."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error


@contextmanager
def read_only(name: str, **inputs: Tensor) -> Iterator[None]:
    """Raise ValueError if the code in this block writes into one of these tensors.

    Tensors count the writes to themselves and their views, so this costs nothing on the device. Inference tensors do
    not; they are compared with a copy.
    """
    versions = {key: tensor._version for key, tensor in inputs.items() if not tensor.is_inference()}
    copies = {key: tensor.clone() for key, tensor in inputs.items() if tensor.is_inference()}
    yield
    for key, tensor in inputs.items():
        unchanged = _equal(tensor, copies[key]) if key in copies else tensor._version == versions[key]
        if not unchanged:
            raise ValueError(f"{name} writes into its input `{key}`: let it work on a copy, {key}.clone()")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors, with NaN equal to NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def model_call(model: object, **inputs: Tensor) -> Iterator[None]:
    """Guard a model's call with these tensors: it must not write into them, nor need gradients.

    Raises ValueError for both; the one for gradients says how a model can compute them all the same.
    """
    name = f"model: {checks.name_of(model)}"
    try:
        with read_only(name, **inputs):
            yield
    except RuntimeError as error:
        if not any(message in str(error) for message in GRADIENT_ERRORS):
            raise
        raise ValueError(
            f"{name} computes gradients, but is called without them ({error}). In the model, use "
            "`with torch.inference_mode(False), torch.enable_grad():` and clone the inputs there, before the first "
            "operation: z = patches.clone().requires_grad_()"
        ) from error


GRADIENT_ERRORS = (
    "does not require grad",
    "Inference tensors cannot be saved for backward",
    "Setting requires_grad=True on inference tensor",
    "One of the differentiated Tensors",
)


# --------------------------------------------------------------------------------------------------- training mode


def check_eval_mode(model: object) -> None:
    """Raise ValueError for a model that is in training mode and computes differently there, or that mixes its chains.

    A module computes differently if its class reads `self.training`, as dropout, batch norm and some user classes do. A
    batch norm without running statistics is refused in either mode: it mixes the chains of a batch.
    """
    for path, module in _modules_of(model):
        where = f"its {type(module).__name__} ({path})" if path else type(module).__name__
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(f"model: {where} takes the statistics of the batch, so a chain would depend on the others")
        if module.training and _depends_on_training(module):
            raise ValueError(f"model: {where} is in training mode, in which it computes otherwise: call model.eval()")


class EvalMode:
    """Checks again that a model is in evaluation mode, by the flags of the modules that it had: without a search."""

    def __init__(self, model: object) -> None:
        self._model, self._modules = model, [module for _, module in _modules_of(model)]

    def check(self) -> None:
        """Raise ValueError as `check_eval_mode` does, if a module has been set to training mode since."""
        if any(module.training for module in self._modules):
            check_eval_mode(self._model)


MAX_DEPTH = 4  # of objects within objects that are searched for modules
MAX_ITEMS, MAX_ALL_ITEMS = 1000, 20_000  # of a container that is searched, and of all
CONTAINERS = (dict, list, tuple, set)
LEAVES = (int, float, str, bytes, type(None), Tensor, torch.dtype, torch.device, type, types.ModuleType)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # its parameters, its modules, which are searched anyway, and its hooks


def _modules_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of each module in a model.

    Searched are attributes, containers, closures, partials, and the global modules that a function or a call reads.
    """
    visited: set[int] = set()
    items = 0

    def search(value: object, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, LEAVES) or id(value) in visited or depth > MAX_DEPTH:
            return
        visited.add(id(value))
        if isinstance(value, nn.Module):
            for name, module in value.named_modules(prefix=path):
                yield name, module
                visited.add(id(module))
                yield from search_parts(module, name, depth)
        else:
            yield from search_parts(value, path, depth)

    def search_parts(value: object, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
        nonlocal items
        if isinstance(value, CONTAINERS):
            items += min(len(value), MAX_ITEMS)
            if items > MAX_ALL_ITEMS:
                return
        for name, part in _parts_of(value):
            yield from search(part, ".".join(filter(None, (path, name))), depth + 1)

    return search(model, "", 0)


def _parts_of(value: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of a container, a function or an object, with their names if they have any."""
    if isinstance(value, dict):
        yield from ((str(name), part) for name, part in value.items() if len(value) <= MAX_ITEMS)
    elif isinstance(value, list | tuple | set):
        yield from (("", part) for part in value if len(value) <= MAX_ITEMS)
    elif isinstance(value, functools.partial):
        yield from (("", part) for part in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                yield "", cell.cell_contents
        yield from _globals_of(value)
    elif isinstance(value, types.MethodType):
        yield from (("", part) for part in (value.__self__, value.__func__))
    else:
        attributes = {**_slots_of(value), **getattr(value, "__dict__", {})}
        yield from ((name, part) for name, part in attributes.items() if name not in OF_EVERY_MODULE)
        yield "", getattr(type(value), "forward" if isinstance(value, nn.Module) else "__call__", None)


def _slots_of(value: object) -> dict[str, object]:
    """Return the attributes that the classes of an object list in `__slots__`."""
    slots = (vars(cls).get("__slots__", ()) for cls in type(value).__mro__)
    names = (name for listed in slots for name in ((listed,) if isinstance(listed, str) else listed))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yield the global modules that a function reads, and the functions of its own file, with their names."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module) or getattr(value, "__globals__", None) is function.__globals__:
            yield name, value


@functools.lru_cache(maxsize=10_000)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of the global variables that code reads, also in the functions within it."""
    own = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    return frozenset(own).union(
        *(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))
    )


def _depends_on_training(module: nn.Module) -> bool:
    """Whether a module computes differently in training mode: its class or a hook reads `self.training`."""
    if getattr(module, "track_running_stats", None) is False:  # an instance norm: the sample's statistics in both modes
        return False
    rates = [getattr(module, name, None) for name in ("p", "dropout")]
    if any(isinstance(rate, Real) and rate == 0 for rate in rates) and type(module).__module__.startswith("torch."):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return "training" in module.code
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    classes: list[type] = [type(each) for each in (module, *hooks)]
    return any(map(_reads_training, classes))


_reading: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()  # a class may hold a model's weights


def _reads_training(cls: type) -> bool:
    """Whether a method or property of a class names `training`; the base classes of torch itself do not count."""
    if cls not in _reading:
        bases = [base for base in cls.__mro__ if base not in (nn.Module, object, types.FunctionType)]
        bases = [base for base in bases if not base.__module__.startswith("torch._dynamo")]
        _reading[cls] = any(_names_training(value, set()) for base in bases for value in vars(base).values())
    return _reading[cls]


def _names_training(value: object, visited: set[object]) -> bool:
    """Whether code names `training`, as an attribute or a string for `getattr`.

    value: a code object with the functions within it; or a function, method or property with what decorators wrapped
    and, unless it is torch's, the functions of its file that it calls. visited: functions that were looked at.
    """
    if isinstance(value, types.CodeType):
        constants = (c == "training" or _names_training(c, visited) for c in value.co_consts)
        return "training" in value.co_names or any(constants)
    called: list[object] = []
    if isinstance(value, types.FunctionType):
        if value in visited:
            return False
        visited.add(value)
        if _names_training(value.__code__, visited):
            return True
        if not str(value.__module__).startswith("torch."):
            called = [part for _, part in _globals_of(value) if not isinstance(part, nn.Module)]
    wrapped = (getattr(value, name, None) for name in ("fget", "__func__", "__wrapped__", "_torchdynamo_orig_callable"))
    return any(inner is not None and _names_training(inner, visited) for inner in (*wrapped, *called))
