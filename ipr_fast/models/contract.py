"""The engine's checks of a model against the Denoiser protocol; each raises a ValueError that says what to change."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.models.denoiser import ContextDenoiser, Denoiser, SlotDenoiser, TableDenoiser
from ipr_fast.sampling import user_code
from ipr_fast.sampling.patches import Grid
from ipr_fast.sampling.prediction import LogitPrediction, Prediction
from ipr_fast.sampling.tokens import TokenPositions, Vocabulary

GRID_NAMES = ("sample_shape", "grid_shape", "num_patches", "patch_numel", "to_patches", "to_images")


def denoiser(model: object) -> Grid:
    """Return a model's grid; refuse one without a grid or the protocol's call, and one in training mode."""
    grid = getattr(model, "grid", None)
    if isinstance(model, type):
        raise ValueError(f"model must be an instance, got the class {model.__name__}")
    if grid is None and hasattr(model, "vocabulary"):
        came = type(model.vocabulary).__name__
        raise ValueError(f"model: the vocabulary of a model of tokens must be an ipr_fast.Vocabulary, got {came}")
    if not callable(model) or grid is None:
        raise ValueError(f"model must be a callable with a `grid` (PatchGrid), got {type(model).__name__}")
    _check_grid(grid)
    _check_call(model)
    for name in ("value_range", "mix_bounds"):
        bounds(model, name)
    own = getattr(model, "patch_dtype", None)
    if own is not None and not isinstance(own, torch.dtype):
        raise ValueError(f"model: patch_dtype must be a torch.dtype, got {own!r:.80}")
    user_code.check_eval_mode(model)
    return grid


def _check_grid(grid: Any) -> None:
    """Check that a grid has what a PatchGrid has, with numbers that agree."""
    lacking = [name for name in GRID_NAMES if not hasattr(grid, name)]
    if lacking:
        raise ValueError(
            f"model must be a callable with a `grid` (PatchGrid), got a {type(grid).__name__} without "
            f"{', '.join(lacking)}"
        )
    count, numel = (
        checks.integer(f"model: grid.{name}", getattr(grid, name), 1) for name in ("num_patches", "patch_numel")
    )
    sample = checks.sizes("model: grid.sample_shape", grid.sample_shape)
    shape = checks.sizes("model: grid.grid_shape", grid.grid_shape)
    if math.prod(shape) != count or math.prod(sample) != count * numel:
        raise ValueError(
            f"model: its grid must have as many numbers in a sample as in its patches, got samples {sample}, "
            f"{count} patches of {numel} numbers, a grid of {shape}"
        )


def is_token_denoiser(model: object) -> bool:
    """Return whether a model has a vocabulary, so that it is meant for tokens."""
    return isinstance(getattr(model, "vocabulary", None), Vocabulary)


def token_denoiser(model: object) -> TokenPositions:
    """Return the positions of a token model; refuse one without the protocol's call, and one in training mode."""
    if isinstance(model, type):
        raise ValueError(f"model must be an instance, got the class {model.__name__}")
    length = getattr(model, "length", None)
    if not callable(model) or isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(
            f"model must be a callable with a `vocabulary` and a `length` >= 1, got {type(model).__name__} of length "
            f"{length!r}"
        )
    function = _forward(model)
    if not _accepts(function, (None, None), _condition_of(function)):
        name = checks.name_of(model)
        raise ValueError(f"model: {name} must be called as model(tokens, active), got {inspect.signature(function)}")
    user_code.check_eval_mode(model)
    return TokenPositions(length)


def _check_call(model: Callable[..., object]) -> None:
    """Check that a model can be called as model(patches, levels, active)."""
    function = _forward(model)
    if not _accepts(function, (None, None, None), _condition_of(function)):
        name = checks.name_of(model)
        raise ValueError(
            f"model: {name} must be called as model(patches, levels, active=None), got {inspect.signature(function)}"
        )


def tabulates(model: Denoiser) -> TypeGuard[TableDenoiser]:
    """Return whether a model has `tabulate` and its calls take a `table`."""
    return _makes(model, "table", "tabulate", "levels, out=None", (None,), {"out": None})


def prepares(model: Denoiser) -> TypeGuard[ContextDenoiser]:
    """Return whether a model has `prepare` and its calls take a `context`."""
    if tabulates(model):
        wanted, options = "patches, active, out=None, *, table=None", {"out": None, "table": None}
    else:
        wanted, options = "patches, active, out=None", {"out": None}
    return _makes(model, "context", "prepare", wanted, (None, None), options)


def takes_slots(model: Denoiser) -> TypeGuard[SlotDenoiser]:
    """Return whether a model's calls take the inputs of its slots, in its `slot_dtype`."""
    is_dtype = isinstance(getattr(model, "slot_dtype", None), torch.dtype)
    return is_dtype and _takes(model, "slots") and tabulates(model) and prepares(model)


def prediction(value: object, shape: tuple[int, int, int], num_patches: int | None = None) -> None:
    """Check that a model returned a Prediction for slots of shape (B, A, P), of a chain's `num_patches`."""
    if isinstance(value, LogitPrediction):
        value = Prediction(*value)
    if not isinstance(value, Prediction):
        raise ValueError(f"model must return a Prediction, got {type(value).__name__}")
    expected = {"velocity": shape, "variance_mix": shape, "log_variance": shape[:2]}
    for name, field in value._asdict().items():
        if field is None and name != "velocity":
            continue
        if not isinstance(field, Tensor) or tuple(field.shape) != expected[name] or not field.is_floating_point():
            came = checks.described(field)
            if isinstance(field, Tensor) and field.ndim > 1 and field.shape[1] == num_patches != shape[1]:
                came += f": the prediction of all {num_patches} patches, which lacks .at(active)"
            raise ValueError(f"model must return a floating-point {name} of shape {expected[name]}, got {came}")


def condition(model: Any, given: bool) -> None:
    """Check that a model's calls take a condition if one is given, and that one is given if they need it."""
    function = _forward(model)
    if given and not _has_argument(function, "condition"):
        raise ValueError(
            f"condition: {checks.name_of(model)} takes none, as its forward() has no argument `condition`; got "
            f"{inspect.signature(function)}"
        )
    parameter = (_parameters(function) or {}).get("condition")
    if not given and parameter is not None and parameter.default is parameter.empty:
        raise ValueError(f"condition must be given: {checks.name_of(model)} needs one, got None")


def prepare_takes_condition(model: Any) -> bool:
    """Return whether the context that a model prepares depends on its condition."""
    return _has_argument(model.prepare, "condition")


def _condition_of(function: Callable[..., object]) -> dict[str, None]:
    """Return the argument `condition` of a function that names it."""
    return {"condition": None} if "condition" in (_parameters(function) or {}) else {}


def _takes(model: Denoiser, name: str) -> bool:
    """Return whether a model's call takes a keyword argument `name`."""
    return _has_argument(_forward(model), name)


def _has_argument(function: Callable[..., object], name: str) -> bool:
    parameters = _parameters(function)
    return parameters is None or name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _makes(
    model: Denoiser, made: str, name: str, wanted: str, arguments: tuple[None, ...], options: dict[str, None]
) -> bool:
    """Return whether a model's call takes an argument `made` and its method `name` makes it.

    Raises ValueError if the method cannot be called with these arguments.
    """
    method = getattr(model, name, None)
    if not _takes(model, made) or not callable(method):
        return False
    if not _accepts(method, arguments, options | _condition_of(method)):
        raise ValueError(
            f"model: {checks.name_of(model)}.{name} must be {name}({wanted}), since forward() takes `{made}`; "
            f"got {name}{inspect.signature(method)}. Rename it if it serves another purpose"
        )
    return True


def _accepts(function: Callable[..., object], arguments: tuple[None, ...], options: dict[str, None]) -> bool:
    """Return whether a function's signature, if it has one, takes these arguments."""
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        pass
    return True


def _forward(model: Callable[..., object]) -> Callable[..., object]:
    """Return the function whose signature a model's call has."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper takes anything
    return inner.forward if isinstance(inner, nn.Module) else inner


def _parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


# ----------------------------------------------------------------------------------------------------------- device


def model_device(model: object, device: torch.device) -> None:
    """Check that a model is on the device of the samples."""
    found = device_of(model)
    if found is not None and found != device:
        raise ValueError(f"model must be on {device}, where the samples are, got {found}")
    if device.type == "meta":
        raise ValueError("model must hold data, got parameters on the meta device")


def device_of(model: object) -> torch.device | None:
    """Return the device of a model's parameters; None for a model without any."""
    if not isinstance(model, nn.Module):
        return None
    first = next(model.parameters(), None)
    return None if first is None else first.device


# ----------------------------------------------------------------------------------------------------- value ranges


class NotFiniteWarning(RuntimeWarning):
    """A model's predictions were NaN or inf: samples are, too, or have tokens that are still masked."""


class RangeWarning(RuntimeWarning):
    """Samples lie in another range than the model's training data."""


def bounds(model: object, name: str) -> tuple[float, float] | None:
    """Return a model's optional attribute (low, high). Raises ValueError for anything but two numbers in order."""
    value: Any = getattr(model, name, None)
    if value is None:
        return None
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low <= high:
        raise ValueError(f"model: {name} must be two numbers (low, high), got {value!r:.80}")
    return low, high


FAR = 4.0  # widths of a model's range; samples of a poor model may lie outside by one width
RARE = 10  # bits: a chance of one in a thousand


def range_complaint(name: str, found: checks.Extremes | None, model: object, *, whole: bool = True) -> str | None:
    """Return a warning if the extremes of samples clearly differ from the model's `value_range`, else None.

    Clearly: no number lies below the middle of the range; or some lie outside it by more than FAR times its width; or,
    of whole samples, most have a number in the highest quarter of the range and too few have one in the lowest. That
    finds samples in [0, 1] of which some numbers are a little below 0, as those that a model has made are.

    Too few: if at least every second sample of the training data has such a number, a batch with so few has a chance
    below one in a thousand. So this takes at least ten samples.
    """
    trained = bounds(model, "value_range")
    if found is None or trained is None:
        return None
    least, most = trained
    low, high, middle, width = min(found.lows), max(found.highs), (least + most) / 2, most - least
    lowest, highest, count = least + width / 4, most - width / 4, len(found.lows)
    have_low, have_high = sum(x < lowest for x in found.lows), sum(x > highest for x in found.highs)
    too_few = whole and 2 * have_high >= count and _bits_against(have_low, count) >= RARE
    if not ((low >= middle and high > middle) or too_few or low < least - FAR * width or high > most + FAR * width):
        return None
    few = f", {have_low} of {count} samples have a number below {lowest:g}" if too_few and low < middle else ""
    return (
        f"{name} lies in [{low:.4g}, {high:.4g}]{few}, but {checks.name_of(model)} was trained on samples in "
        f"[{least:g}, {most:g}]: scale {name} to that range"
    )


def _bits_against(number: int, count: int) -> float:
    """Bound the chance 2**-bits that an event of probability 1/2 or more happens `number` or fewer times of `count`.

    Chernoff's bound: count * (1 - h), with the entropy h of the share in bits.
    """
    share = number / count
    if share >= 0.5:
        return 0.0
    return count * (1 + sum(p * math.log2(p) for p in (share, 1 - share) if p))


def mix_complaint(model: object, found: Tensor | None) -> str | None:
    """Return a warning if the mix's range (2,) leaves the model's `mix_bounds`. Waits for the device."""
    if found is None:
        return None
    low, high = found.tolist()
    if math.isnan(low):  # the samples are NaN too, and have a warning of their own
        return None
    least, most = bounds(model, "mix_bounds") or (0.0, 1.0)
    if low >= least - MIX_ROUNDING and high <= most + MIX_ROUNDING:
        return None
    return (
        f"model: the variance mix of {checks.name_of(model)} lies in [{low:.3g}, {high:.3g}], expected [{least:g}, "
        f"{most:g}]: the noise of a step is then far too much or too little. Is a sigmoid missing?"
    )


MIX_ROUNDING = 2**-7  # of a bfloat16 near 1
