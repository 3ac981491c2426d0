"""Hue, saturation and value of colours."""

from __future__ import annotations

import torch
from torch import Tensor


def to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert colours (B, 3, ...) in [0, 1] to hue, saturation and value (B, ...), in [0, 1]; the hue of grey is 0."""
    red, green, blue = rgb.unbind(1)
    value, spread = rgb.amax(1), rgb.amax(1) - rgb.amin(1)
    safe = torch.where(spread > 0, spread, 1.0)
    hue = torch.where(value == red, (green - blue) / safe, 0.0)
    hue = torch.where(value == green, 2 + (blue - red) / safe, hue)
    hue = torch.where(value == blue, 4 + (red - green) / safe, hue)
    hue = torch.where(spread > 0, hue / 6 % 1, 0.0)
    return hue, torch.where(spread > 0, spread / torch.where(value > 0, value, 1.0), 0.0), value


def of_hue(hue: Tensor, saturation: float | Tensor, value: float | Tensor) -> Tensor:
    """Return the colours (B, 3, ...) in [0, 1] of hues (B, ...) in turns, with a saturation and a value."""
    shift = 4 * torch.arange(3, device=hue.device).view(3, *[1] * (hue.ndim - 1))  # of red, green and blue, in sixths
    pure = ((6 * hue[:, None] + shift) % 6 - 3).abs().sub(1).clamp(0, 1)
    saturation, value = (each[:, None] if isinstance(each, Tensor) else each for each in (saturation, value))
    return value * (1 - saturation * (1 - pure))
