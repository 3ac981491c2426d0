"""A small network that reads an object's picture: a polygon and its vertices, a digit, or neither."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ipr_fast.tasks.polygons.drawing import FEWEST_VERTICES, MOST_POLYGONS, MOST_VERTICES
from ipr_fast.tasks.polygons.objects import CROP

WEIGHTS = Path(__file__).with_name("reader.safetensors")
POLYGONS = MOST_VERTICES - FEWEST_VERTICES + 1  # classes 0..4: polygons of 3..7 vertices
DIGITS = MOST_POLYGONS  # classes 5..13: digits 1..9
OTHER = POLYGONS + DIGITS  # the last class: cut or joined objects, blots


class ObjectReader(nn.Module):
    """Classifies crops of objects: 113,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, size in ((1, 24, 6), (24, 32, 4), (32, 48, 4)):
            layers += [nn.Conv2d(inputs, outputs, size, stride=2, padding=size // 2 - 1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(nn.Linear(48 * (CROP // 8) ** 2 + 1, 96), nn.ReLU(), nn.Linear(96, OTHER + 1))

    def forward(self, crops: Tensor, sides: Tensor) -> Tensor:
        """Return the logits (M, 15) of crops (M, CROP, CROP) that show squares of these sides (M,) in pixels."""
        size = (sides / CROP).log()[:, None]
        return self.head(torch.cat([self.convolutions(2 * crops[:, None] - 1), size], dim=1))


@cache
def bundled_reader(device: torch.device) -> ObjectReader:
    """Return the package's reader, on a device, for inference."""
    with torch.device(device):
        reader = ObjectReader()
    reader.load_state_dict(load_file(WEIGHTS))
    return reader.eval().requires_grad_(False)


@cache
def held_out_accuracy() -> dict[str, float]:
    """Return what `train_reader.py` measured with the bundled reader on images that it had not seen: see there."""
    with safe_open(WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["measured"])["held_out"]
