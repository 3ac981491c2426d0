"""Load models, save them as safetensors with their configuration, and describe a weights file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.checks import FLOAT_DTYPES, dtype_names
from ipr_fast.models.files.published import complete_config, from_published
from ipr_fast.models.files.sources import NoSuchModel, bundled_models, find
from ipr_fast.models.files.weight_files import (
    check_weights,
    plain_name,
    read_weights,
    safetensors_bytes,
)
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.models.srm_unet import SRMUNet
from ipr_fast.models.srm_unet_config import SRMUNetConfig
from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.models.token_transformer_config import TokenTransformerConfig
from ipr_fast.outputs import replacing

StoredModel = PatchTransformer | SRMUNet | TokenTransformer  # the models that files hold
StoredConfig = PatchTransformerConfig | SRMUNetConfig | TokenTransformerConfig

ARCHITECTURES: dict[str, type[StoredConfig]] = {
    "PatchTransformer": PatchTransformerConfig,
    "SRMUNet": SRMUNetConfig,
    "TokenTransformer": TokenTransformerConfig,
}


def _build(config: StoredConfig) -> StoredModel:
    """Make the model of a configuration, with new weights."""
    if isinstance(config, PatchTransformerConfig):
        return PatchTransformer(config)
    return TokenTransformer(config) if isinstance(config, TokenTransformerConfig) else SRMUNet(config)


def bundled_model_for(sample_shape: tuple[int, ...]) -> str:
    """Return the name of the bundled model for samples (C, H, W) or of N tokens, (N,).

    Raises NoSuchModel, listing all, if there is none.
    """
    shapes = {name: model_info(name)["sample_shape"] for name in bundled_models()}
    for name, shape in shapes.items():
        if shape == tuple(sample_shape):
            return name
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    shape = tuple(sample_shape)
    raise NoSuchModel("model", f"must be given: none is bundled for samples of shape {shape}; bundled: {listed}")


def model_info(source: str | os.PathLike) -> dict[str, Any]:
    """Describe a weights file without building its model.

    Returns path, architecture, sample_shape and patch_shape (None where the file does not have them; tokens have no
    patches), parameters (their number), dtype (as stored) and metadata (for a published checkpoint, the fields that
    follow from its shapes).
    """
    path = find(source)
    weights, shape, patch_shape = read_weights(path), None, None
    if "architecture" not in weights.metadata:
        published = from_published(path, weights.tensors)
        metadata = {name: str(value) for name, value in published.fields.items()}
        metadata["weights"] = published.layout.prefix.rstrip(".") or "plain"
        architecture, tensors = SRMUNet.__name__, published.tensors
    else:
        tensors, metadata = weights
        architecture, config = metadata["architecture"], _stored_config(path, metadata)
        shape = config.sample_shape
        patch_shape = None if isinstance(config, TokenTransformerConfig) else config.grid.patch_shape
    return {
        "path": str(path),
        "architecture": architecture,
        "sample_shape": shape,
        "patch_shape": patch_shape,
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtype": dtype_names(sorted({t.dtype for t in tensors.values()}, key=str)),
        "metadata": metadata,
    }


def load_model(
    source: str | os.PathLike,
    *,
    config: object | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StoredModel:
    """Load a Denoiser or TokenDenoiser for inference: in eval mode, its parameters without gradients.

    source: the name of a bundled model; a .safetensors file that `save_model` wrote; a checkpoint of the published
        Spatial Reasoning Models (.ckpt of Lightning, .pt of spatialreasoners); or a Hugging Face hub id `owner/name`
        (its model.safetensors) or `owner/name/file`, optionally with `@revision`. Of a checkpoint the moving average is
        loaded, if it has one, else the plain weights. No code in a file is ever run.
    config: the model's configuration, where the file has none: a config object, the name of a preset ("even_pixels",
        "counting_polygons", "mnist_sudoku"), or a dict of the fields that do not follow from the weights' shapes:
        image_size, patch_size, num_head_channels and, if not the defaults, the schedules; for spatialreasoners also
        level_scale, level_shift, activation, max_period, parameterization, flow and variance, as in its configuration.
    device, dtype: of the weights. By default the CPU, and float32 for bundled models, which may be stored in half
        precision, else the stored dtype.

    Raises ValueError, naming the file and the problem: an unknown name, no such file, truncated or foreign contents, no
    configuration, or weights whose names or shapes do not fit the configuration.
    """
    device = checks.usable_device("device", "cpu" if device is None else device)
    path = find(source)
    if dtype is None and source in bundled_models():
        dtype = torch.float32
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be a floating-point type, {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}")
    contents = _read(path, config)
    with torch.device("meta"):  # allocates nothing, and draws no random weights
        model = _build(contents.config)
    check_weights(path, contents.tensors, model.state_dict(), contents.key)
    dtypes = {tensor.dtype for tensor in contents.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"{path}: its weights are of several types, {', '.join(map(str, dtypes))}: pass dtype=")
    # Copies: weights may share memory with each other, or with a file that another process writes to.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in contents.tensors.items()}
    model.load_state_dict(own, assign=True)
    if dtype is not None:
        _check_range(path, model, dtype, contents.key)
    # torch's stub lacks memory_format.
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def save_model(model: StoredModel, path: str | os.PathLike, **metadata: str) -> None:
    """Write a model's weights, configuration and metadata to one .safetensors file, atomically.

    model: may be compiled by torch.compile; the weights keep their names. metadata: strings, under other names than
    "format", "architecture" and "config". Equal weights and metadata give equal bytes. Raises ValueError for another
    kind of model or metadata, OSError where the file cannot be written; an existing file is then left as it was.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if type(model).__name__ not in ARCHITECTURES:
        raise ValueError(f"model must be one of {sorted(ARCHITECTURES)}, got {type(model).__name__}")
    own = {"format": "pt", "architecture": type(model).__name__, "config": json.dumps(model.config.to_dict())}
    for name, value in metadata.items():
        if name in own or not isinstance(value, str):
            raise ValueError(
                f"metadata must be strings, under other names than {sorted(own)}, got {name}={value!r:.80}"
            )
    tensors = {
        plain_name(name): tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()
    }
    with replacing(path) as file:
        file.write(safetensors_bytes(tensors, {**own, **metadata}))


class _Contents(NamedTuple):
    """A file's configuration and weights, and the file's name for a weight, for messages."""

    config: StoredConfig
    tensors: dict[str, Tensor]
    key: Callable[[str], str]


def _read(path: Path, config: object | None) -> _Contents:
    """Read a file that `save_model` wrote, or a published one; `config` as for `load_model`."""
    tensors, metadata = read_weights(path)
    has_config = "architecture" in metadata
    if has_config and config is None:
        return _Contents(_stored_config(path, metadata), tensors, str)
    if isinstance(config, (PatchTransformerConfig, TokenTransformerConfig)):
        return _Contents(config, tensors, str)
    if has_config and not isinstance(config, SRMUNetConfig):
        known = sorted(config_type.__name__ for config_type in ARCHITECTURES.values())
        raise ValueError(
            f"config must be one of {known}, or left out, as {path} has a configuration of its own; got {config!r:.80}"
        )
    published = from_published(path, tensors)
    return _Contents(complete_config(path, published, config), published.tensors, published.layout.key)


def _stored_config(path: Path, metadata: dict[str, str]) -> StoredConfig:
    """Return the configuration in the metadata that `save_model` wrote."""
    name = metadata["architecture"]
    if name not in ARCHITECTURES or "config" not in metadata:
        raise ValueError(f"{path}: its metadata hold no configuration of one of {sorted(ARCHITECTURES)}; pass config=")
    try:
        return ARCHITECTURES[name](**json.loads(metadata["config"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration is not one of {name} ({error})") from error


def _check_range(path: Path, model: StoredModel, dtype: torch.dtype, key: Callable[[str], str]) -> None:
    """Raise ValueError for a weight beyond the range of `dtype`."""
    for name, tensor in model.state_dict().items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if math.isfinite(largest) and largest > torch.finfo(dtype).max:
            raise ValueError(f"{path}: weight {key(name)!r} is up to {largest:g}, more than {dtype} can hold")
