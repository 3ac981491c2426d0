"""The recordings in tests/data: what the published implementation computed with random weights, float32, on a CPU."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ipr_fast import load_model
from ipr_fast.models import SRMUNet, SRMUNetConfig

DATA = Path(__file__).parent / "data"


def read(name: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one recording, and its configuration and settings."""
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def config_of(name: str) -> SRMUNetConfig:
    """The configuration of a recorded model."""
    fields = SRMUNetConfig.__dataclass_fields__
    return SRMUNetConfig(**{key: value for key, value in read(f"{name}.forward")[1].items() if key in fields})


def model_of(name: str) -> SRMUNet:
    """A recorded model, from the file that has its weights."""
    files = {"tiny_gray": "tiny_gray.ckpt", "tiny_rgb": "tiny_rgb.weights.safetensors"}
    return load_model(DATA / files[name], config=config_of(name))
