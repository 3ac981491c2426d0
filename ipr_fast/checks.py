"""Checks of arguments, which raise a ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.errors import first_line

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return an integer in low..high as an int; bool is refused."""
    is_bool = isinstance(value, bool)
    if isinstance(value, Integral) and not is_bool:
        number = int(value)
        if low <= number and (high is None or number <= high):
            return number
    expected = f"an int >= {low}" if high is None else f"an int in {low}..{high}"
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def as_float(value: object) -> float:
    """Return a real number as a float: inf for one that is too large, NaN for anything else and for bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number(name: str, value: object, low: float, high: float | None = None) -> float:
    """Return a finite number in [low, high] as a float; bool is refused."""
    number = as_float(value)
    if math.isfinite(number) and low <= number and (high is None or number <= high):
        return number
    expected = f">= {low:g}" if high is None else f"in [{low:g}, {high:g}]"
    raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def boolean(name: str, value: object) -> bool:
    """Return True or False as it is."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")
    return value


def sizes(name: str, value: object) -> tuple[int, ...]:
    """Return a sequence of sizes >= 1 as a tuple of ints."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name} must be a sequence of ints >= 1, got {value!r:.80}")
    return tuple(integer(f"{name}: each size", size, 1) for size in value)


def folder(name: str, value: object) -> None:
    """Check that a folder is a path, as text that is not empty or as a Path, or None."""
    if not isinstance(value, str | Path | None) or value == "":
        raise ValueError(f"{name} must be the path of a folder, got {value!r:.80}")


def judged(judge: object, value: object, *sizes: int | str, least: int = 1) -> None:
    """Check samples (B, *sizes) that a judge is called with; a name such as "H" stands for any size from `least` on."""
    expected = f"a torch.Tensor of shape (B, {', '.join(map(str, sizes))})"
    expected += f" with {' and '.join(size for size in sizes if isinstance(size, str))} >= {least}" * (least > 1)
    if not isinstance(value, Tensor):
        raise ValueError(f"{type(judge).__name__}: samples must be {expected}, got {type(value).__name__}")
    fits = value.ndim == 1 + len(sizes) and all(
        got >= least if isinstance(size, str) else got == size for got, size in zip(value.shape[1:], sizes, strict=True)
    )
    if not fits:
        raise ValueError(f"{type(judge).__name__}: samples must be {expected}, got shape {tuple(value.shape)}")


def samples(name: str, value: object, sample_shape: tuple[int, ...] | None = None) -> Tensor:
    """Check that samples are float (B, C, ...) of 1 to 3 spatial dimensions, or of a sample shape (C, ...).

    `extremes` checks the values.
    """
    images = sample_shape is None or len(sample_shape) == 3
    if not isinstance(value, Tensor):
        of = "images (B, C, H, W)" if images else "samples"
        raise ValueError(f"{name} must be a torch.Tensor of {of}, got {type(value).__name__}")
    if sample_shape is None and not 3 <= value.ndim <= 5:
        raise ValueError(
            f"{name} must be (B, C, L), images (B, C, H, W) or video (B, C, T, H, W), got shape {tuple(value.shape)}"
        )
    if sample_shape is not None and value.ndim != 1 + len(sample_shape):
        dims = "the four dimensions (B, C, H, W)" if images else f"{1 + len(sample_shape)} dimensions"
        raise ValueError(f"{name} must have {dims}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_DTYPES or value.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor of {dtype_names(FLOAT_DTYPES)}, got {value.layout} {value.dtype}"
        )
    if sample_shape is not None and tuple(value.shape[1:]) != tuple(sample_shape):
        expected = ", ".join(map(str, sample_shape))
        raise ValueError(f"{name} must have shape (B, {expected}) to fit the model, got {tuple(value.shape)}")
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    return value


class Extremes(NamedTuple):
    """The smallest and the largest number of each of B samples."""

    lows: list[float]
    highs: list[float]


def extremes(name: str, value: Tensor) -> Extremes | None:
    """Return the extremes of samples (B, ...), which must be finite in float32; None without numbers."""
    if not value.numel():
        return None
    found = Extremes(*torch.stack(torch.aminmax(value.float().flatten(1), dim=1)).tolist())  # NaN if any number is
    if not all(map(math.isfinite, (*found.lows, *found.highs))):
        bad = count_not_finite(value)
        raise ValueError(f"{name} must be finite in float32, got NaN or inf in {bad} of its samples")
    return found


def same_settings(path: Path, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Check that the run stored at `path` has the expected settings; it may have more."""
    other = [f"{name} {found.get(name)} (now {value})" for name, value in expected.items() if found.get(name) != value]
    if other:
        raise ValueError(f"{path}: a run of other settings: {', '.join(other)}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Check that a tensor is on the device."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def usable_device(name: str, value: torch.device | str) -> torch.device:
    """Return the device, on which tensors can be made, with its index: "cuda" as cuda:0."""
    try:
        device = torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{name} {value!r} cannot be used: {first_line(error)}") from error
    if device.type == "meta":
        raise ValueError(f"{name} 'meta' cannot be used: it holds no data")
    return device


# ------------------------------------------------------------------------------------------------------------ words


def not_finite(value: Tensor) -> Tensor:
    """Return which samples of (B, ...) have a NaN or inf in float32: (B,) bool."""
    return (~torch.isfinite(value.float())).flatten(1).any(1)


def count_not_finite(value: Tensor) -> int:
    """Count the samples of (B, ...) with a NaN or inf in float32."""
    return int(not_finite(value).sum())


def name_of(function: object) -> str:
    """Return the name of a user's function, or of a model's class, for a message."""
    return getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]


def instance_or_class(value: object) -> str:
    """Return the name of a user's object, and that it is a class where an instance is due, for a message."""
    return f"the class {value.__qualname__}" if isinstance(value, type) else name_of(value)


def described(value: object) -> str:
    """Return a tensor's shape and dtype, or the type of anything else, for a message."""
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return dtypes as text: "bfloat16, float32"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
