"""The fields that models' configurations share, and checks of fields; each raises a ValueError that names the field.

A configuration may come from a file. The upper bounds are far above any useful network: they stop a damaged file from
taking hours or all memory before its weights are checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ipr_fast.kernels.philox import MAX_PATCH_NUMEL, MAX_PATCHES
from ipr_fast.sampling.patches import PatchGrid, patch_sides
from ipr_fast.sampling.schedule import Schedule

MAX_SIZE = 1 << 20
MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class ModelConfig:
    """Samples in patches.

    image_size: an int for square images, else the samples' spatial sizes: (L,), (H, W) or (T, H, W). patch_size: an
    int, or the size of a patch in each of these dimensions. Sizes that an int can say are kept as one.

    Every configuration has `generate_schedule` and `refine_schedule`, the model's default schedules, as
    (steps_per_patch, overlap) or with (..., shift, group).
    """

    channels: int
    image_size: int | tuple[int, ...]
    patch_size: int | tuple[int, ...]

    def __post_init__(self) -> None:
        positive_int("channels", self.channels)
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        sides = patch_sides("patch_size", self.patch_size, self.spatial)
        if len(self.spatial) == 2 and len(set(self.spatial)) == 1:
            object.__setattr__(self, "image_size", self.spatial[0])
        if len(set(sides)) == 1:
            object.__setattr__(self, "patch_size", sides[0])
        grid = self.grid
        if grid.num_patches > MAX_PATCHES or grid.patch_numel > MAX_PATCH_NUMEL:
            raise ValueError(
                f"patch_size: must give at most {MAX_PATCHES} patches of at most {MAX_PATCH_NUMEL} numbers, which is "
                f"what the random numbers' counters hold, got {grid.num_patches} of {grid.patch_numel}"
            )
        for name in ("generate_schedule", "refine_schedule"):
            object.__setattr__(self, name, schedule_values(name, getattr(self, name)))

    @property
    def spatial(self) -> tuple[int, ...]:
        """The spatial sizes of a sample."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> PatchGrid:
        """The division of a sample into patches."""
        return PatchGrid.of((self.channels, *self.spatial), self.patch_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, *spatial)."""
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
        """Check the fields; `sides`: the tokens along each dimension, rows and columns where there are boxes."""
        for name in ("width", "num_heads", "mlp_ratio"):
            positive_int(name, getattr(self, name))
        positive_int("depth", self.depth, MAX_LAYERS)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} and {self.width}")
        size = self.box_size
        is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not is_size or (size and (len(sides) != 2 or any(side % size for side in sides))):
            across = " x ".join(map(str, sides))
            must = "be 0 or divide the sides of" if len(sides) == 2 else "be 0, without rows and columns, for"
            raise ValueError(f"box_size must {must} {across} tokens, got {size!r}")


def positive_int(name: str, value: object, high: int = MAX_SIZE) -> int:
    """Return `value`, an int in 1..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} must be a positive int of at most {high}, got {value!r:.80}")
    return value


def _sizes(name: str, value: object) -> int | tuple[int, ...]:
    """Return an int, or a tuple of one to three; JSON brings lists."""
    if not isinstance(value, (tuple, list)):
        return positive_int(name, value)
    if not 1 <= len(value) <= 3:
        raise ValueError(f"{name} must be an int or one to three of them, got {value!r:.80}")
    return tuple(positive_int(name, size) for size in value)


def schedule_values(name: str, value: object) -> tuple[Any, ...]:
    """Return `Schedule.values` of (steps_per_patch, overlap[, shift, group]), a tuple or a list as JSON has it."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 4):
        raise ValueError(
            f"{name} must be (steps_per_patch, overlap) or (steps_per_patch, overlap, shift, group), got {value!r:.80}"
        )
    return Schedule(*value).values
