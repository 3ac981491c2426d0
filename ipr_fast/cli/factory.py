"""`--model module:factory`: a model that the user's own code builds."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.weight_files import SUFFIXES

NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
FACTORY = re.compile(rf"(?P<module>{NAME}):(?P<name>{NAME})")


def is_factory(source: str) -> bool:
    """Whether `--model` is `module:factory`, and not a path such as C:model.pt or an existing file."""
    return FACTORY.fullmatch(source) is not None and Path(source).suffix not in SUFFIXES and not Path(source).exists()


def model_from_factory(source: str, device: torch.device, dtype: torch.dtype | None) -> Denoiser:
    """Import `module`, with the working directory on the path, and return what `factory()` builds.

    A Denoiser in place of a factory is taken as it is. A torch module is moved to the device and dtype, and put into
    eval mode without gradients, as `load_model` does. Raises ValueError where the module cannot be imported, has no
    such name, the factory raises, or the result does not follow the Denoiser protocol.
    """
    module_name, _, name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: object = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        raise ValueError(f"--model {source}: cannot import {module_name} ({_reason(error)})") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"--model {source}: {module_name} has no {name}")
        value = getattr(value, part)
    is_model = not isinstance(value, type) and hasattr(value, "grid")
    model = value if is_model else _call(source, value)
    if isinstance(model, nn.Module):
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    elif dtype is not None:
        raise ValueError(f"--dtype: {source} is a {type(model).__name__}; only a torch.nn.Module can be converted")
    return _checked(source, model)


def _call(source: str, factory: object) -> object:
    if not callable(factory):
        raise ValueError(f"--model {source}: is a {type(factory).__name__}, neither a Denoiser nor a function")
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {source}: raised {_reason(error)}") from error


def _checked(source: str, model: object) -> Denoiser:
    """The model, if it follows the protocol."""
    kind = type(model).__name__
    if not callable(model):
        raise ValueError(f"--model {source}: got a {kind}, which cannot be called as model(patches, levels, active)")
    if not hasattr(model, "grid"):
        raise ValueError(f"--model {source}: got a {kind} without the attribute `grid` (ipr_fast.PatchGrid)")
    try:
        contract.denoiser(model)
    except ValueError as error:
        raise ValueError(f"--model {source}: {error}") from error
    assert isinstance(model, Denoiser)
    return model


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
