"""The recordings in tests/data: runs of the published implementation with random weights, float32, on a CPU."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ipr_fast import load_model
from ipr_fast.models import SRMUNet, SRMUNetConfig

DATA = Path(__file__).parent / "data"


def read(name: str) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a recording, and its configuration and settings."""
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def config_of(name: str) -> SRMUNetConfig:
    """Return the configuration of a recorded model."""
    fields = SRMUNetConfig.__dataclass_fields__
    return SRMUNetConfig(**{key: value for key, value in read(f"{name}.forward")[1].items() if key in fields})


def model_of(name: str) -> SRMUNet:
    """Load a recorded model from the file with its weights."""
    files = {"tiny_gray": "tiny_gray.ckpt", "tiny_rgb": "tiny_rgb.weights.safetensors"}
    return load_model(DATA / files[name], config=config_of(name))
