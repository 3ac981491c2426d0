"""The configuration of a PatchTransformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipr_fast.models.model_config import LayersConfig, ModelConfig, positive_int

MAX_PIXEL_WIDTH = 1 << 10


@dataclass(frozen=True)
class PatchTransformerConfig(LayersConfig, ModelConfig):
    """The shape of a PatchTransformer; a patch is a token of its layers.

    level_features: sinusoidal features of a level (even).
    pixel_width: hidden units of the networks for single pixels (pixel_networks.py); None for linear layers of patches.

    Raises ValueError, naming the field.
    """

    level_features: int = 64
    pixel_width: int | None = None
    generate_schedule: tuple[Any, ...] = (3, 0.0)
    refine_schedule: tuple[Any, ...] = (10, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_layers(self.grid.grid_h, self.grid.grid_w)
        if positive_int("level_features", self.level_features) % 2:
            raise ValueError(f"level_features must be even, got {self.level_features}")
        if self.pixel_width is not None:
            positive_int("pixel_width", self.pixel_width, MAX_PIXEL_WIDTH)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them; without pixel_width where it is None, as older files are."""
        fields = super().to_dict()
        if self.pixel_width is None:
            del fields["pixel_width"]
        return fields
