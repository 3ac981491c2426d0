"""Options whose value is `module:name`, of the user's own code: a model's factory, a reward."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.weight_files import SUFFIXES
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.rewards import Reward

DOTTED_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
FACTORY = re.compile(f"{DOTTED_NAME}:{DOTTED_NAME}")


def is_factory(source: str) -> bool:
    """Whether `--model` is `module:factory`, and not a path such as C:model.pt or an existing file."""
    return FACTORY.fullmatch(source) is not None and Path(source).suffix not in SUFFIXES and not Path(source).exists()


def model_from_factory(source: str, device: torch.device, dtype: torch.dtype | None) -> Denoiser | TokenDenoiser:
    """Import `module` (also from the working directory); return the Denoiser or TokenDenoiser that `factory()` builds.

    One in place of a factory is returned itself. A torch module is moved to the device and dtype and put into
    eval mode without gradients, as `load_model` does. Raises ValueError when the module cannot be imported or has no
    such name, and when the factory raises or returns no Denoiser.
    """
    value = _imported("--model", source)
    if not isinstance(value, type) and _is_model(value):
        model, must = value, "must be"
    elif callable(value):
        model, must = _called(source, value), "must return"
    else:
        raise ValueError(
            f"--model {source} must be a function that returns a Denoiser, or a Denoiser, got {type(value).__name__}"
        )
    kind = type(model).__name__
    if not callable(model):
        raise ValueError(f"--model {source} {must} a Denoiser, got {kind}, which cannot be called")
    if not _is_model(model):
        raise ValueError(f"--model {source} {must} a Denoiser, got {kind} without a `grid` (ipr_fast.PatchGrid)")
    if isinstance(model, nn.Module):
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    elif dtype is not None:
        raise ValueError(f"--dtype needs a model that is a torch.nn.Module, got {kind} from {source}")
    try:
        if contract.is_token_denoiser(model):
            contract.token_denoiser(model)
        else:
            contract.denoiser(model)
    except ValueError as error:
        raise ValueError(f"--model {source}: {error}") from error
    assert isinstance(model, (Denoiser, TokenDenoiser))
    return model


def _is_model(value: object) -> bool:
    """Whether a value has what tells a model: a Denoiser's grid or a TokenDenoiser's vocabulary."""
    return hasattr(value, "grid") or contract.is_token_denoiser(value)


def reward_from(source: str) -> Reward:
    """Import `module` (also from the working directory); return its function `name`, the reward of `--accept`.

    Raises ValueError when the text is not module:name, the module cannot be imported or has no such function.
    """
    if FACTORY.fullmatch(source) is None:
        raise ValueError(f"--accept must be module:function, got {source!r}")
    value = _imported("--accept", source)
    if not callable(value) or isinstance(value, type):
        got = "a class" if isinstance(value, type) else type(value).__name__
        raise ValueError(f"--accept {source} must be a function of samples (B, ...), got {got}")
    return value


def _imported(option: str, source: str) -> object:
    """The object that the code of a module calls `name`; source: module:name, the value of this option."""
    module, _, name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: object = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # code of the user's, which may raise anything
        raise ValueError(f"{option} {source}: cannot import {module} ({_reason(error)})") from error
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise ValueError(f"{option} {source}: {module} has no {name}") from error
    return value


def _called(source: str, factory: Callable[[], object]) -> object:
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {source} raised {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
