"""The configuration of a PatchTransformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipr_fast.models.model_config import MAX_LAYERS, ModelConfig, positive_int

MAX_PIXEL_WIDTH = 1 << 10


@dataclass(frozen=True)
class PatchTransformerConfig(ModelConfig):
    """The shape of a PatchTransformer.

    width, depth: numbers of a token, and layers. num_heads divides width; mlp_ratio: hidden width of the MLP / width.
    box_size: if > 0, tokens also get an embedding of their box of box_size x box_size patches (Sudoku).
    level_features: sinusoidal features of a level (even).
    pixel_width: hidden units of the networks for single pixels (pixel_networks.py); None for linear layers of patches.

    Raises ValueError, naming the field.
    """

    width: int = 96
    depth: int = 5
    num_heads: int = 6
    mlp_ratio: int = 4
    box_size: int = 0
    level_features: int = 64
    pixel_width: int | None = None
    generate_schedule: tuple[int, float] = (3, 0.0)
    refine_schedule: tuple[int, float] = (10, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "num_heads", "mlp_ratio", "level_features"):
            positive_int(name, getattr(self, name))
        positive_int("depth", self.depth, MAX_LAYERS)
        if self.pixel_width is not None:
            positive_int("pixel_width", self.pixel_width, MAX_PIXEL_WIDTH)
        if self.width % self.num_heads or self.level_features % 2:
            raise ValueError(
                f"num_heads must divide width and level_features be even, got {self.num_heads}, {self.width} and "
                f"{self.level_features}"
            )
        size, side = self.box_size, self.grid.grid_h
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (size and side % size):
            raise ValueError(f"box_size must be 0 or divide the grid's {side} patches, got {size!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them; without pixel_width where it is None, as older files are."""
        fields = super().to_dict()
        if self.pixel_width is None:
            del fields["pixel_width"]
        return fields
