"""Weights on disk: safetensors with the model's configuration in the metadata, and the models that are bundled."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ipr_fast.models.patch_transformer import PatchTransformer, PatchTransformerConfig

ARCHITECTURES = {"PatchTransformer": (PatchTransformer, PatchTransformerConfig)}


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    weights = resources.files("ipr_fast.models") / "weights"
    return sorted(f.name.removesuffix(".safetensors") for f in weights.iterdir() if f.name.endswith(".safetensors"))


def bundled_model_for(sample_shape: tuple[int, ...]) -> str:
    """The bundled model whose samples have the shape (C, H, W). Raises ValueError with the list when there is none."""
    shapes = {name: model_info(name)["sample_shape"] for name in bundled_models()}
    for name, shape in shapes.items():
        if shape == tuple(sample_shape):
            return name
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"model: none is bundled for samples (C, H, W) = {tuple(sample_shape)}; bundled: {listed}")


def model_info(source: str | os.PathLike) -> dict:
    """What a weights file says of itself, without building the model: sample_shape, parameters, metadata."""
    path = _find(source)
    tensors, metadata = _read(path)
    model_type, config = _config(path, metadata, None)
    return {
        "path": str(path),
        "architecture": model_type.__name__,
        "sample_shape": (config.channels, config.image_size, config.image_size),
        "parameters": sum(t.numel() for t in tensors.values()),
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

    source: the name of a bundled model, or the path of a .safetensors file that `save_model` wrote.
    config: the model's configuration, where the file does not carry one (default: the file's metadata).
    device, dtype: where and in what precision the weights go (default: the CPU, as stored).

    Raises ValueError, naming the file and what is wrong with it: an unknown name, no such file, not a safetensors
    file, no configuration, or weights whose names or shapes are not the configuration's.
    """
    path = _find(source)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    tensors, metadata = _read(path)
    model_type, config = _config(path, metadata, config)
    model = model_type(config)
    _load_weights(model, tensors, path)
    return model.to(device="cpu" if device is None else device, dtype=dtype).eval().requires_grad_(False)


def save_model(model: PatchTransformer, path: str | os.PathLike, **metadata: str) -> None:
    """Write a model's weights, its configuration and further metadata as one .safetensors file, atomically.

    Metadata values are strings. Raises OSError where the file cannot be written; an earlier one is then left whole.
    """
    path = Path(path)
    description = {"architecture": type(model).__name__, "config": json.dumps(model.config.to_dict())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(tensors, metadata={"format": "pt", **description, **metadata}))
    replace_durably(partial, path)


def replace_durably(partial: Path, path: Path) -> None:
    """Put a finished file in the place of `path`: after a crash either the old or the new one is there, whole."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _find(source: str | os.PathLike) -> Path:
    bundled = bundled_models()
    if isinstance(source, str) and source in bundled:
        return Path(str(resources.files("ipr_fast.models") / "weights" / f"{source}.safetensors"))
    path = Path(source)
    if path.is_file():
        return path
    raise ValueError(f"source must be a bundled model ({', '.join(bundled)}) or an existing file, got {str(source)!r}")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _config(path: Path, metadata: dict[str, str], config: object | None) -> tuple[type[torch.nn.Module], object]:
    """The model's class and configuration: `config` if given, else what the metadata say."""
    if config is None:
        name = metadata.get("architecture")
        if name not in ARCHITECTURES or "config" not in metadata:
            raise ValueError(
                f"{path}: its metadata hold no configuration of one of {sorted(ARCHITECTURES)}; pass config="
            )
        try:
            return ARCHITECTURES[name][0], ARCHITECTURES[name][1](**json.loads(metadata["config"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: its configuration is not one of {name} ({error})") from error
    for model_type, config_type in ARCHITECTURES.values():
        if isinstance(config, config_type):
            return model_type, config
    known = sorted(config_type.__name__ for _, config_type in ARCHITECTURES.values())
    raise ValueError(f"config must be one of {known}, got {type(config).__name__}")


def _load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path}: no weight {name!r}, expected shape {tuple(expected[name].shape)}")
        if name not in expected:
            raise ValueError(f"{path}: unexpected weight {name!r} of shape {tuple(tensors[name].shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: weight {name!r} is of {tensors[name].dtype}, expected a floating-point type")
        if tensors[name].shape != expected[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise ValueError(f"{path}: weight {name!r} has shape {found}, expected {wanted}")
    model.load_state_dict(tensors, assign=True)
