"""Checks of what a user passes in: each raises a ValueError that names the argument, what came and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

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


# ------------------------------------------------------------------------------------------------------------ words


def count_not_finite(value: Tensor) -> int:
    """How many samples of (B, ...) hold a NaN or inf, as float32."""
    return int((~torch.isfinite(value.float())).flatten(1).any(1).sum())


def name_of(function: Callable) -> str:
    """The name of a user's function, or of a model's class, for a message."""
    return getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
