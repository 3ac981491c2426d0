"""The benchmark's own classifier of Counting Polygons as a judge, where the user has its weights.

A ResNet-50 with four heads (Wewer et al. 2025). Its weights are published as BartekPog/counting-polygons-classifier:
`hf download BartekPog/counting-polygons-classifier --local-dir classifier`. Read here without torchvision or srmbench.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BLOCKS, WIDTHS = (3, 4, 6, 3), (64, 128, 256, 512)  # of ResNet-50 (He et al. 2016)
WIDER = 4  # channels after a block, in its width
PREFIX = "model."  # of the weights' names


class Seen(NamedTuple):
    """What the classifier sees in B images: rows of each field."""

    polygons: Tensor  # (B,) int64
    vertices: Tensor  # (B,) int64
    numbers: Tensor  # (B, 2) int64: the two digits, the smaller first
    uniform: Tensor  # (B,) bool


class PolygonsClassifier(nn.Module):
    """Reads images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, vertices: tuple[int, int], polygons: tuple[int, int]) -> None:
        """vertices, polygons: the fewest and the most."""
        super().__init__()
        self.vertices, self.polygons = vertices, polygons
        self.pairs = pairs_of_numbers(vertices)
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for i, (count, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True)):
            blocks = []
            for k in range(count):
                blocks.append(_Block(channels, width, stride=2 if i and not k else 1))
                channels = WIDER * width
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        classes = {
            "num_polygons": polygons[1] - polygons[0] + 1,
            "num_vertices": vertices[1] - vertices[0] + 1,
            "is_uniform": 2,
            "numbers_label": len(self.pairs),
        }
        heads = {name: nn.Linear(channels, count) for name, count in classes.items()}
        self.fc = nn.ModuleDict({"heads": nn.ModuleDict(heads)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of each head."""
        x = F.max_pool2d(self.bn1(self.conv1(images)).relu(), 3, stride=2, padding=1)
        for i in range(len(BLOCKS)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        x = x.mean((2, 3))
        return {name: head(x) for name, head in self.get_submodule("fc.heads").named_children()}

    @torch.no_grad()
    def read(self, images: Tensor) -> Seen:
        """Return what the most probable classes say."""
        found = {name: logits.argmax(1) for name, logits in self(images).items()}
        pairs = torch.tensor(self.pairs, device=images.device)
        return Seen(
            found["num_polygons"] + self.polygons[0],
            found["num_vertices"] + self.vertices[0],
            pairs[found["numbers_label"]],
            found["is_uniform"] == 1,
        )


class _Block(nn.Module):
    """A bottleneck of three convolutions; the second one has the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = WIDER * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def pairs_of_numbers(vertices: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the pairs of digits in the order of their classes: a number of polygons in 1..9 and one of vertices."""
    pairs = [(min(p, v), max(p, v)) for v in range(vertices[0], vertices[1] + 1) for p in range(1, 10)]
    return list(dict.fromkeys(pairs))


def load_classifier(folder: str | Path) -> PolygonsClassifier:
    """Load the classifier from its folder, for inference on the CPU. Raises ValueError if its files are not there."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        with torch.device("cpu"):
            model = PolygonsClassifier(
                (config["min_vertices"], config["max_vertices"]),
                (config["min_num_polygons"], config["max_num_polygons"]),
            )
        model.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"classifier: {folder} must have the benchmark's {CONFIG} and {WEIGHTS} ({reason})") from error
    return model.eval().requires_grad_(False)
