"""The fields that models' configurations share, and checks of fields; each raises a ValueError that names the field.

A configuration may come from a file. The upper bounds are far above any useful network: they stop a damaged file from
taking hours or all memory before its weights are checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ipr_fast.kernels.philox import MAX_PATCH_NUMEL, MAX_PATCHES
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.sampling.schedule import Schedule

MAX_SIZE = 1 << 20
MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class ModelConfig:
    """Square samples (channels, image_size, image_size) in square patches.

    Every configuration has `generate_schedule` and `refine_schedule`, the model's default schedules, as
    (steps_per_patch, overlap) or with (..., shift, group).
    """

    channels: int
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        for name in ("channels", "image_size", "patch_size"):
            positive_int(name, getattr(self, name))
        grid = self.grid
        if grid.num_patches > MAX_PATCHES or grid.patch_numel > MAX_PATCH_NUMEL:
            raise ValueError(
                f"patch_size: must give at most {MAX_PATCHES} patches of at most {MAX_PATCH_NUMEL} numbers, which is "
                f"what the random numbers' counters hold, got {grid.num_patches} of {grid.patch_numel}"
            )
        for name in ("generate_schedule", "refine_schedule"):
            object.__setattr__(self, name, schedule_values(name, getattr(self, name)))

    @property
    def grid(self) -> PatchGrid:
        """The division of a sample into patches."""
        return PatchGrid(self.channels, self.image_size, self.image_size, self.patch_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.grid.sample_shape

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them."""
        return asdict(self)


@dataclass(frozen=True)
class LayersConfig:
    """The layers of a PartialTransformer.

    width, depth: numbers of a token, and layers. num_heads divides width; mlp_ratio: hidden width of the MLP / width.
    box_size: if > 0, tokens also get an embedding of their box of box_size x box_size tokens (Sudoku).
    """

    width: int = 96
    depth: int = 5
    num_heads: int = 6
    mlp_ratio: int = 4
    box_size: int = 0

    def check_layers(self, *sides: int) -> None:
        """Check the fields; `sides`: the rows and the columns of tokens."""
        for name in ("width", "num_heads", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        positive_int("depth", self.depth, MAX_LAYERS)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} and {self.width}")
        size = self.box_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (size and any(s % size for s in sides)):
            across = " x ".join(map(str, sides))
            raise ValueError(f"box_size must be 0 or divide the sides of {across} tokens, got {size!r}")


def positive_int(name: str, value: object, high: int = MAX_SIZE) -> int:
    """Return `value`, an int in 1..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} must be a positive int of at most {high}, got {value!r:.80}")
    return value


def schedule_values(name: str, value: object) -> tuple[Any, ...]:
    """Return `Schedule.values` of (steps_per_patch, overlap[, shift, group]), a tuple or a list as JSON has it."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 4):
        raise ValueError(
            f"{name} must be (steps_per_patch, overlap) or (steps_per_patch, overlap, shift, group), got {value!r:.80}"
        )
    return Schedule(*value).values
