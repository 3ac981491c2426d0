"""Samples as pictures: images as they are, video as a row of its frames, sequences as lines."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ipr_fast.errors import import_extra

if TYPE_CHECKING:
    import PIL.Image

PIXELS = (-1.0, 1.0)  # of images
PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 480, 160, 14  # at least so many pixels wide
LINES = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))  # by channel
GREY, INK = (200, 200, 200), (80, 80, 80)


def pillow() -> ModuleType:
    """Import pillow. Raises MissingExtra or BrokenExtra where that fails."""
    return import_extra("PIL.Image", "pillow", "plots", "PNG files")


def can_be_drawn(sample_shape: tuple[int, ...]) -> bool:
    """Return whether samples (C, ...) can be: sequences of any channels, images and video in grey or colour."""
    return len(sample_shape) == 2 or (len(sample_shape) in (3, 4) and sample_shape[0] in (1, 3))


def range_of(samples: Tensor, trained: tuple[float, float] | None) -> tuple[float, float]:
    """Return the numbers (low, high) that pictures of samples (B, C, ...) show.

    trained: the range of a model's training samples; None takes the samples' own. Sequences get a range that holds all
    of their finite numbers as well.
    """
    finite = samples.float()[samples.isfinite()]
    own = (finite.min().item(), finite.max().item()) if finite.numel() else PIXELS
    low, high = own if trained is None else trained
    if samples.ndim == 3:
        low, high = min(low, own[0]), max(high, own[1])
    return (low, high) if low < high else (low - 1, high + 1)


def draw(sample: Tensor, shown: tuple[float, float] = PIXELS, depth: int = 8) -> PIL.Image.Image:
    """Return the picture of a finite sample (C, L), (C, H, W) or (C, T, H, W) on the CPU.

    shown: the numbers that are black and white, or the ends of a sequence's axis; others are clamped. depth: bits of a
    pixel, 16 for grey images only.
    """
    if sample.ndim == 2:
        return _lines(sample, shown)
    low, high = shown
    most, dtype = (65535, np.uint16) if depth == 16 and sample.shape[0] == 1 else (255, np.uint8)
    share = (sample.float().clamp(low, high) - low) / (high - low)
    if sample.ndim == 4:
        share = _in_a_row(share)
    pixels = (share * most).round().permute(1, 2, 0).numpy().astype(dtype)
    return pillow().fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _in_a_row(video: Tensor) -> Tensor:
    """Return video (C, T, H, W) as an image (C, H, T W + gaps), with white gaps between frames."""
    gap = max(1, video.shape[-1] // 16)
    frames = torch.nn.functional.pad(video, (0, gap), value=1.0)
    return frames.permute(0, 2, 1, 3).flatten(2)[..., :-gap]


def _lines(sequence: Tensor, shown: tuple[float, float]) -> PIL.Image.Image:
    """Return a plot of a sequence (C, L): a line for each channel, over an axis from low to high."""
    drawing: Any = import_extra("PIL.ImageDraw", "pillow", "plots", "PNG files")
    low, high = shown
    length = sequence.shape[1]
    step = max(1, math.ceil(PLOT_WIDTH / max(1, length - 1)))
    size = step * max(1, length - 1) + 2 * PLOT_MARGIN, PLOT_HEIGHT + 2 * PLOT_MARGIN
    picture = pillow().new("RGB", size, "white")
    pen = drawing.Draw(picture)

    def place(value: float) -> float:
        return PLOT_MARGIN + PLOT_HEIGHT * (high - value) / (high - low)

    for value in {low, high} | ({0.0} if low < 0 < high else set()):
        pen.line([(PLOT_MARGIN, place(value)), (size[0] - PLOT_MARGIN, place(value))], fill=GREY)
    for channel, values in enumerate(sequence.float().clamp(low, high).tolist()):
        points = [(PLOT_MARGIN + step * i, place(value)) for i, value in enumerate(values)]
        pen.line(points if length > 1 else [points[0], (size[0] - PLOT_MARGIN, points[0][1])], LINES[channel % 6], 2)
    for value, top in ((high, 1), (low, size[1] - PLOT_MARGIN + 1)):
        pen.text((PLOT_MARGIN, top), f"{value:.4g}", fill=INK)
    return picture
