"""Checks of what a user passes in: each raises a ValueError that names the argument, what came and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from ipr_fast.kernels import philox
from ipr_fast.models.denoiser import Prediction
from ipr_fast.patches import PatchGrid
from ipr_fast.schedule import Schedule

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
    """Finite float images (B, C, H, W), of the sample shape (C, H, W) if one is given."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of images (B, C, H, W), got {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(f"{name} must have the four dimensions (B, C, H, W), got shape {tuple(value.shape)}")
    if value.dtype not in IMAGE_DTYPES or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor of {_names(IMAGE_DTYPES)}, got {value.layout} {value.dtype}")
    if sample_shape is not None and tuple(value.shape[1:]) != tuple(sample_shape):
        wanted = ", ".join(map(str, sample_shape))
        raise ValueError(f"{name} must have shape (B, {wanted}) to fit the model, got {tuple(value.shape)}")
    bad = count_not_finite(value)
    if bad:
        raise ValueError(f"{name} must be finite in float32, got NaN or inf in {bad} of its samples")
    return value


def patch_mask(name: str, value: object, batch: int, grid: PatchGrid, device: torch.device) -> Tensor:
    """A bool mask over patches, (B, N) or (B, grid_h, grid_w), as (B, N)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    shapes = (batch, grid.num_patches), (batch, grid.grid_h, grid.grid_w)
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {shapes[0]} or {shapes[1]}, got {tuple(value.shape)}")
    if value.dtype != torch.bool:
        raise ValueError(f"{name} must be of dtype torch.bool, got {value.dtype}")
    same_device(name, value, device)
    return value.reshape(shapes[0])


def free_patches(known: object, batch: int, grid: PatchGrid, device: torch.device) -> Tensor:
    """The patches (B, N) bool that are not known; all of them by default."""
    if known is None:
        return torch.ones(batch, grid.num_patches, dtype=torch.bool, device=device)
    return ~patch_mask("known", known, batch, grid, device)


def chain_ids(value: object, batch: int, device: torch.device) -> Tensor:
    """Chain ids int64 (B,); by default 0..B-1."""
    if value is None:
        return torch.arange(batch, device=device)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (batch,):
        came = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"chain_ids must be an int64 tensor of shape ({batch},), got {came}")
    same_device("chain_ids", value, device)
    value = value.clone()  # the caller may go on with it
    if batch and not 0 <= int(value.min()) <= int(value.max()) <= philox.MAX_CHAIN_ID:
        raise ValueError(f"chain_ids must lie in 0..{philox.MAX_CHAIN_ID}, got {int(value.min())}..{int(value.max())}")
    return value


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


def denoiser(model: object) -> PatchGrid:
    """A model that can be called and has a grid; returns the grid."""
    grid = getattr(model, "grid", None)
    if not callable(model) or not isinstance(grid, PatchGrid):
        raise ValueError(f"model must be a callable with a `grid` (PatchGrid), got {type(model).__name__}")
    return grid


def prediction(value: object, shape: tuple[int, int, int]) -> None:
    """What a model returned for slots of shape (B, A, P): a Prediction of these shapes."""
    if not isinstance(value, Prediction):
        raise ValueError(f"model must return a Prediction, got {type(value).__name__}")
    wanted = {"velocity": shape, "variance_mix": shape, "log_variance": shape[:2]}
    for name, field in value._asdict().items():
        if field is None and name != "velocity":
            continue
        if not isinstance(field, Tensor) or tuple(field.shape) != wanted[name] or not field.is_floating_point():
            came = f"{tuple(field.shape)} of {field.dtype}" if isinstance(field, Tensor) else type(field).__name__
            raise ValueError(f"model must return a floating-point {name} of shape {wanted[name]}, got {came}")


def schedule(value: object) -> Schedule:
    """A Schedule."""
    if not isinstance(value, Schedule):
        raise ValueError(f"schedule must be an ipr_fast.Schedule, got {type(value).__name__}")
    return value


def counters(grid: PatchGrid, plan: Schedule, first_iteration: int, iters: int) -> None:
    """The random numbers' counters must hold every patch, element, step and iteration."""
    if grid.num_patches > philox.MAX_PATCHES:
        raise ValueError(f"model: at most {philox.MAX_PATCHES} patches can be counted, got {grid.num_patches}")
    if grid.patch_numel > philox.MAX_PATCH_NUMEL:
        raise ValueError(f"model: at most {philox.MAX_PATCH_NUMEL} numbers a patch can be counted")
    steps = plan.steps(grid.num_patches)
    if steps > philox.MAX_STEPS:
        raise ValueError(f"schedule: at most {philox.MAX_STEPS} steps can be counted, got up to {steps} from {plan}")
    last = first_iteration + iters - 1
    if last > philox.MAX_ITERATION:
        raise ValueError(f"first_iteration + iters: the last iteration can be {philox.MAX_ITERATION}, got {last}")


def count_not_finite(value: Tensor) -> int:
    """How many samples of (B, ...) hold a NaN or inf, as float32."""
    return int((~torch.isfinite(value.float())).flatten(1).any(1).sum())


def name_of(function: Callable) -> str:
    """What to call a user's function or model in a message."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
