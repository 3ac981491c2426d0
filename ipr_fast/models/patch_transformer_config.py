"""The configuration of a PatchTransformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ipr_fast.models.model_config import LayersConfig, ModelConfig, positive_int

MAX_PIXEL_WIDTH = 1 << 10
MAX_PATCH_PIXELS = 65535 * 64  # for a pixel head: the programs of a CUDA grid's second dimension, of 64 pixels each
PIXELS = (-1.0, 1.0)
OUTPUTS = ("velocity", "clean")


@dataclass(frozen=True)
class PatchTransformerConfig(LayersConfig, ModelConfig):
    """The shape of a PatchTransformer; a patch is a token of its layers.

    level_features: sinusoidal features of a level (even).
    pixel_width: hidden units of the networks for single pixels (pixel_networks.py); None for linear layers of patches.
    output: what the linear read-out predicts, "velocity" or the "clean" patch, from which the velocity follows. Where a
        patch has more numbers than `width`, its noise does not pass through a token, so that "clean" is needed.
    value_range: (low, high) of the samples that it is trained on, such as latents; None where there is no range.

    Raises ValueError, naming the field.
    """

    level_features: int = 64
    pixel_width: int | None = None
    output: str = "velocity"
    value_range: tuple[float, float] | None = PIXELS
    generate_schedule: tuple[Any, ...] = (3, 0.0)
    refine_schedule: tuple[Any, ...] = (10, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_layers(*self.grid.grid_shape)
        if positive_int("level_features", self.level_features) % 2:
            raise ValueError(f"level_features must be even, got {self.level_features}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}, got {self.output!r}")
        if self.pixel_width is not None:
            if self.output != "velocity":
                raise ValueError(f'output must be "velocity" with a pixel_width, got {self.output!r}')
            positive_int("pixel_width", self.pixel_width, MAX_PIXEL_WIDTH)
            pixels = self.grid.patch_numel // self.channels
            if pixels > MAX_PATCH_PIXELS:
                raise ValueError(
                    f"pixel_width must be None for patches of more than {MAX_PATCH_PIXELS} pixels, got {pixels}"
                )
        if self.value_range is not None:
            object.__setattr__(self, "value_range", _range(self.value_range))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them; without those that older files lack, where they have defaults."""
        fields = super().to_dict()
        for name, default in (("pixel_width", None), ("output", "velocity"), ("value_range", PIXELS)):
            if fields[name] == default:
                del fields[name]
        return fields


def _range(value: object) -> tuple[float, float]:
    """Return (low, high) from a tuple, or from a list as JSON has it."""
    try:
        low, high = map(float, value)  # type: ignore[call-overload]  # anything may come from a file
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range must be two finite numbers (low, high) or None, got {value!r:.80}")
    return low, high
