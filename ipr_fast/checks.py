"""Checks of what a user passes in: each raises a ValueError that names the argument, what came and what was wanted."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import Tensor, nn

IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int in low..high."""
    fits = (
        isinstance(value, Integral) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    )
    if not fits:
        wanted = f"an int >= {low}" if high is None else f"an int in {low}..{high}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return int(value)


def number(name: str, value: object, low: float, high: float | None = None) -> float:
    """A finite number in [low, high]."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or (high is not None and value > high):
        wanted = f">= {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")
    return float(value)


def boolean(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")
    return value


def images(name: str, value: object, sample_shape: tuple[int, ...] | None = None) -> Tensor:
    """Float images (B, C, H, W), of the sample shape (C, H, W) if one is given; `extremes` looks at their values."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of images (B, C, H, W), got {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(f"{name} must have the four dimensions (B, C, H, W), got shape {tuple(value.shape)}")
    if value.dtype not in IMAGE_DTYPES or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor of {_names(IMAGE_DTYPES)}, got {value.layout} {value.dtype}")
    if sample_shape is not None and tuple(value.shape[1:]) != tuple(sample_shape):
        wanted = ", ".join(map(str, sample_shape))
        raise ValueError(f"{name} must have shape (B, {wanted}) to fit the model, got {tuple(value.shape)}")
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    return value


def extremes(name: str, value: Tensor) -> tuple[float, float] | None:
    """The smallest and largest number of finite samples (B, ...), in float32; None where there is none."""
    if not value.numel():
        return None
    low, high = torch.stack(torch.aminmax(value.float())).tolist()  # NaN is both, where there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = count_not_finite(value)
        raise ValueError(f"{name} must be finite in float32, got NaN or inf in {bad} of its samples")
    return low, high


FAR = 4.0  # samples of a poor model may well lie outside of its range, by as much as it is wide


def range_complaint(name: str, found: tuple[float, float] | None, model: object) -> str | None:
    """What is wrong with samples from `found[0]` to `found[1]` for a model that was trained on another range.

    Only what can hardly be chance: nothing below the middle of the model's `value_range`, or numbers that lie farther
    outside than FAR times its width.
    """
    wanted = getattr(model, "value_range", None)
    if found is None or wanted is None:
        return None
    (low, high), (least, most) = found, wanted
    middle, width = (least + most) / 2, most - least
    if (low >= middle and high > middle) or low < least - FAR * width or high > most + FAR * width:
        return (
            f"{name} lies in [{low:.4g}, {high:.4g}], but {name_of(model)} was trained on samples in "
            f"[{least:g}, {most:g}]: scale {name} to that range"
        )
    return None


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def usable_device(name: str, value: object) -> torch.device:
    """A device on which tensors can be made, with its index: "cuda" as cuda:0."""
    try:
        device = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} {value!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError(f"{name} 'meta' cannot be used: it holds no data")
    return device


def model_device(model: object, device: torch.device) -> None:
    """An explicit model must be where the samples are."""
    found = device_of(model)
    if found is not None and found != device:
        raise ValueError(f"model must be on {device}, where the samples are, got {found}")


def device_of(model: object) -> torch.device | None:
    """Where a model's parameters are; None for a model without any."""
    if not isinstance(model, torch.nn.Module):
        return None
    first = next(model.parameters(), None)
    return None if first is None else first.device


# ------------------------------------------------------------------------------------------- calls of a user's code


@contextmanager
def unwritten(who: str, **inputs: Tensor) -> Iterator[None]:
    """Within, code of the user's may read these tensors. Raises ValueError where it has written to one.

    Tensors count the writes to themselves and to their views, so this costs nothing on the device; those that do not,
    which are made under `torch.inference_mode`, are compared with a copy.
    """
    before = {name: tensor.clone() if tensor.is_inference() else tensor._version for name, tensor in inputs.items()}
    yield
    for name, tensor in inputs.items():
        same = torch.equal(tensor, before[name]) if tensor.is_inference() else tensor._version == before[name]
        if not same:
            raise ValueError(f"{who} writes into its input `{name}`: let it work on a copy, {name}.clone()")


@contextmanager
def model_call(model: object, **inputs: Tensor) -> Iterator[None]:
    """Within, a model is called with these tensors: it must not write to them, and gradients need some care."""
    try:
        with unwritten(f"model: {name_of(model)}", **inputs):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NEEDS_GRADIENTS):
            raise
        raise ValueError(
            f"model: {name_of(model)} computes gradients, and the engine calls it without ({error}). In the model, "
            "use `with torch.inference_mode(False), torch.enable_grad():` and clone the inputs there, before the first "
            "operation: z = patches.clone().requires_grad_()"
        ) from error


NEEDS_GRADIENTS = (
    "does not require grad",
    "Inference tensors cannot be saved for backward",
    "Setting requires_grad=True on inference tensor",
    "One of the differentiated Tensors",
)


def inference_mode_of(name: str, model: object) -> None:
    """A model must not be in training mode, where that makes a difference: dropout and batch norm, above all."""
    for path, module in _modules_of(model):
        if module.training and _depends_on_training(module):
            where = f"its {type(module).__name__} ({path})" if path else type(module).__name__
            raise ValueError(f"{name}: {where} is in training mode, in which it computes otherwise: call model.eval()")


def _modules_of(model: object) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by their paths; of another object, those of its attributes that are modules."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
        return
    for name, value in getattr(model, "__dict__", {}).items():
        if isinstance(value, nn.Module):
            yield from value.named_modules(prefix=name)


def _depends_on_training(module: nn.Module) -> bool:
    """Whether a module reads `self.training`, and does anything with it."""
    if getattr(module, "track_running_stats", None) is False:  # a norm by the batch's own statistics in both modes
        return False
    rates = [getattr(module, name, None) for name in ("p", "dropout")]
    if any(isinstance(rate, Real) and rate == 0 for rate in rates) and type(module).__module__.startswith("torch."):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return "training" in module.code
    return _reads_training(type(module))


@functools.cache
def _reads_training(kind: type[nn.Module]) -> bool:
    ours = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    ours = [cls for cls in ours if not cls.__module__.startswith("torch._dynamo")]
    functions = (value for cls in ours for value in vars(cls).values() if isinstance(value, types.FunctionType))
    return any("training" in names for function in functions for names in _names_in(function.__code__))


def _names_in(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)


# ------------------------------------------------------------------------------------------------------------ words


def count_not_finite(value: Tensor) -> int:
    """How many samples of (B, ...) hold a NaN or inf, as float32."""
    return int((~torch.isfinite(value.float())).flatten(1).any(1).sum())


def name_of(function: Callable) -> str:
    """The name of a user's function, or of a model's class, for a message."""
    return getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
