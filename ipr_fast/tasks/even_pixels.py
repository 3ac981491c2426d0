"""Even Pixels: images with equally many pixels of two opposite hues.

Task and metrics of Wewer et al. 2025, "Spatial Reasoning with Denoising Models" (their package srmbench): 32x32 RGB
images, each pixel of saturation 1, value 0.7 and hue h in [0, 0.5) or h + 0.5, 512 pixels of either. No pixel is right
or wrong by itself, only the counts are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.hues import of_hue, to_hsv

SIZE, PATCH = 32, 4
SATURATION, VALUE = 1.0, 0.7
BINS = 256  # of the hue histogram


class EvenPixelsReport(NamedTuple):
    """The benchmark's metrics of each image.

    balanced        (B,) bool: imbalance is 0
    imbalance       (B,) int64: surplus pixels of one hue, 0..512
    saturation_std  (B,) float32: standard deviation of the saturation over the image's pixels; 0 for a perfect image
    value_std       (B,) float32: likewise of the value

    Read all three: `balanced` looks at hues alone, and two of a hundred images of noise are balanced by chance.
    """

    balanced: Tensor
    imbalance: Tensor
    saturation_std: Tensor
    value_std: Tensor

    @property
    def good(self) -> Tensor:
        return self.balanced

    def measures(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("imbalance", "saturation_std", "value_std")}


class EvenPixels:
    """The task of Even Pixels."""

    name, noun, adjective = "even-pixels", "image", "balanced"

    def __init__(self) -> None:
        self.grid = PatchGrid(3, SIZE, SIZE, PATCH)

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw even images (B, 3, 32, 32) in [-1, 1], on the generator's device."""
        checks.integer("batch_size", batch_size, 0)
        device = generator.device
        hue = 0.5 * torch.rand(batch_size, 1, generator=generator, device=device)
        order = torch.rand(batch_size, SIZE * SIZE, generator=generator, device=device).argsort(1)
        is_opposite = torch.zeros(batch_size, SIZE * SIZE, device=device)
        is_opposite.scatter_(1, order[:, : SIZE * SIZE // 2], 1.0)
        return colours(hue + 0.5 * is_opposite).unflatten(-1, (SIZE, SIZE))

    def judge(self) -> HueJudge:
        """Return a judge of images."""
        return HueJudge()


class HueJudge:
    """Judges images as the benchmark does."""

    note = "balanced by hue alone, as the benchmark counts: two of a hundred images of noise are; see the deviations"

    def __call__(self, images: Tensor) -> EvenPixelsReport:
        """Judge images (B, 3, H, W), clamped to [-1, 1]. Raises ValueError for another shape."""
        checks.judged(self, images, 3, "H", "W")
        hue, saturation, value = to_hsv(((images.float() + 1) / 2).clamp(0, 1).flatten(2))
        imbalance = (_between_borders(_histogram(hue)) - hue.shape[1] // 2).abs()
        return EvenPixelsReport(imbalance == 0, imbalance, _deviation(saturation), _deviation(value))


def colours(hue: Tensor) -> Tensor:
    """Convert hues (B, n) in [0, 1) to the task's colours (B, 3, n) in [-1, 1]."""
    return 2 * of_hue(hue, SATURATION, VALUE) - 1


def _deviation(values: Tensor) -> Tensor:
    """Return the standard deviation of each row of values (B, n): (B,) float32, computed in float64."""
    values = values.double()
    return (values - values.mean(1, keepdim=True)).square().mean(1).sqrt().float()


def _histogram(hue: Tensor) -> Tensor:
    """Count the hues (B, n) in each bin: (B, 256) int64."""
    bins = (hue * BINS).long().clamp(max=BINS - 1)
    return torch.zeros(len(hue), BINS, dtype=torch.int64, device=hue.device).scatter_add_(
        1, bins, torch.ones_like(bins)
    )


def _between_borders(histogram: Tensor) -> Tensor:
    """Count the pixels on one side of the two borders between the hues: (B,) int64.

    The hues are the fullest bin (the first of equals) and its opposite; the borders lie half way between them.
    """
    bins = torch.arange(BINS, device=histogram.device)
    peak = (histogram * BINS + (BINS - 1 - bins)).argmax(1)
    sum_of_peaks = 2 * (peak % (BINS // 2)) + BINS // 2
    first, second = sum_of_peaks // 2, (sum_of_peaks + BINS) // 2
    second = torch.where(second > BINS, second - BINS, second)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    inside = (bins >= low[:, None]) & (bins < high[:, None])
    return (histogram * inside).sum(1)
