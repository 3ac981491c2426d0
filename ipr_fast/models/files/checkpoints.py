"""Models on disk: loading them, saving them as safetensors with their configuration, and what a file says of itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ipr_fast import checks
from ipr_fast.files import replacing
from ipr_fast.models.files.published import complete_config, from_published
from ipr_fast.models.files.sources import NoSuchModel, bundled_models, find
from ipr_fast.models.files.weight_files import (
    DTYPES,
    check_weights,
    dtype_names,
    plain_name,
    read_weights,
    safetensors_bytes,
)
from ipr_fast.models.patch_transformer import PatchTransformer, PatchTransformerConfig
from ipr_fast.models.srm_unet import SRMUNet
from ipr_fast.models.srm_unet_config import SRMUNetConfig

ARCHITECTURES = {
    "PatchTransformer": (PatchTransformer, PatchTransformerConfig),
    "SRMUNet": (SRMUNet, SRMUNetConfig),
}


def bundled_model_for(sample_shape: tuple[int, ...]) -> str:
    """The bundled model whose samples have the shape (C, H, W). Raises ValueError with the list when there is none."""
    shapes = {name: model_info(name)["sample_shape"] for name in bundled_models()}
    for name, shape in shapes.items():
        if shape == tuple(sample_shape):
            return name
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    shape = tuple(sample_shape)
    raise NoSuchModel("model", f"must be given: none is bundled for samples (C, H, W) = {shape}; bundled: {listed}")


def model_info(source: str | os.PathLike) -> dict:
    """What a weights file says of itself, without building the model.

    path, architecture, sample_shape (None where the file does not tell), parameters, dtype (of the weights, as stored),
    metadata (for a published checkpoint, what its shapes tell).
    """
    path = find(source)
    weights = read_weights(path)
    if "architecture" not in weights.metadata:
        published = from_published(path, weights.tensors)
        told = {name: str(value) for name, value in published.fields.items()}
        told["weights"] = published.layout.prefix.rstrip(".") or "plain"
        architecture, tensors, metadata, shape = SRMUNet.__name__, published.tensors, told, None
    else:
        tensors, metadata = weights
        model_type, config = _described(path, metadata)
        architecture, shape = model_type.__name__, (config.channels, config.image_size, config.image_size)
    return {
        "path": str(path),
        "architecture": architecture,
        "sample_shape": shape,
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
) -> torch.nn.Module:
    """Load a model for inference: in eval mode, its parameters without gradients.

    source: the name of a bundled model; a .safetensors file that `save_model` wrote; a checkpoint of the published
        Spatial Reasoning Models (.ckpt of Lightning, .pt of spatialreasoners); or a Hugging Face hub id `owner/name`
        (its model.safetensors) or `owner/name/file`, with `@revision` if need be. A checkpoint's moving average is
        taken where it has one, else its plain weights. No code in a file is ever run.
    config: where the file does not carry one, the model's configuration: an SRMUNetConfig or PatchTransformerConfig,
        the name of a preset ("even_pixels", "counting_polygons", "mnist_sudoku"), or a dict of what the weights' shapes
        do not tell: image_size, patch_size, num_head_channels and, unless the defaults will do, the schedules.
    device, dtype: where and in what precision the weights go (default: the CPU; float32 for the bundled models, which
        may be stored in half of that, else as stored).

    Raises ValueError, naming the file and what is wrong with it: an unknown name, no such file, truncated or foreign
    contents, no configuration, or weights whose names or shapes are not the configuration's.
    """
    device = checks.usable_device("device", "cpu" if device is None else device)
    path = find(source)
    if dtype is None and source in bundled_models():
        dtype = torch.float32
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be a floating-point type, {', '.join(map(str, DTYPES))}, got {dtype}")
    tensors, metadata = read_weights(path)
    described, key = "architecture" in metadata, str
    if described and config is None:
        model_type, config = _described(path, metadata)
    elif isinstance(config, PatchTransformerConfig):
        model_type = PatchTransformer
    elif described and not isinstance(config, SRMUNetConfig):
        known = sorted(config_type.__name__ for _, config_type in ARCHITECTURES.values())
        raise ValueError(
            f"config must be one of {known}, or better none, since {path} carries its own; got {config!r:.80}"
        )
    else:
        model_type = SRMUNet
        published = from_published(path, tensors)
        tensors, key = published.tensors, published.key
        config = complete_config(path, published.fields, config)
    with torch.device("meta"):  # no memory for what a file only claims to hold, no time for random weights
        model = model_type(config)
    check_weights(path, tensors, model.state_dict(), key)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"{path}: its weights are of several types, {', '.join(map(str, dtypes))}: pass dtype=")
    # Copies: weights may share memory with each other, or with a file that somebody writes to.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    model.load_state_dict(own, assign=True)
    if dtype is not None:
        _check_range(path, model, dtype, key)
    model = model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def save_model(model: PatchTransformer | SRMUNet, path: str | os.PathLike, **metadata: str) -> None:
    """Write a model's weights, its configuration and further metadata as one .safetensors file, atomically.

    model: may be compiled by torch.compile; the weights keep their names. metadata: further strings; "format",
    "architecture" and "config" are the file's own. Equal weights and metadata give equal bytes. Raises ValueError for
    another model or metadata, OSError where the file cannot be written; an earlier one is then left whole.
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


def _check_range(path: Path, model: torch.nn.Module, dtype: torch.dtype, key: Callable[[str], str]) -> None:
    """Raise ValueError for a weight that `dtype` cannot hold."""
    for name, tensor in model.state_dict().items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if math.isfinite(largest) and largest > torch.finfo(dtype).max:
            raise ValueError(f"{path}: weight {key(name)!r} is up to {largest:g}, more than {dtype} can hold")


def _described(path: Path, metadata: dict[str, str]) -> tuple[type[torch.nn.Module], object]:
    """The model's class and configuration, as the metadata that `save_model` wrote say."""
    name = metadata["architecture"]
    if name not in ARCHITECTURES or "config" not in metadata:
        raise ValueError(f"{path}: its metadata hold no configuration of one of {sorted(ARCHITECTURES)}; pass config=")
    try:
        return ARCHITECTURES[name][0], ARCHITECTURES[name][1](**json.loads(metadata["config"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration is not one of {name} ({error})") from error
