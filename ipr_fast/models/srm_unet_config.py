"""The configuration of an SRMUNet, and presets: the networks of the published Spatial Reasoning Models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipr_fast import checks
from ipr_fast.models.model_config import ModelConfig, positive_int

GROUPS = 32  # of every GroupNorm
MAX_RESOLUTIONS, MAX_BLOCKS = 20, 64


@dataclass(frozen=True)
class SRMUNetConfig(ModelConfig):
    """The shape of an SRMUNet.

    hid_dims: channels of each resolution, multiples of 32, finest first; each resolution has half the size of the one
        before, rounded up.
    attention: for each resolution, whether self-attention follows each of its ResBlocks.
    num_blocks: ResBlocks of a resolution in the encoder; the decoder has one more.
    num_head_channels: channels of an attention head; divides the channels of every resolution with attention, and of
        the coarsest, whose bottleneck always has it.
    t_emb_dim, d_emb: width of the level embedding, and of its sinusoidal features (even).
    level_scale, level_shift: the embedding is of max(level_scale t + level_shift, 0).
    mix: the network puts out the variance mix v as 2 v - 1, "halved", or as it is, "raw".

    Raises ValueError, naming the field. Source: Wewer et al. 2025 and the configurations in their code.
    """

    hid_dims: tuple[int, ...]
    attention: tuple[bool, ...]
    num_blocks: int = 2
    num_head_channels: int = 64
    t_emb_dim: int = 512
    d_emb: int = 256
    generate_schedule: tuple[Any, ...] = (3, 0.0)
    refine_schedule: tuple[Any, ...] = (10, 0.8)
    level_scale: float = 1000
    level_shift: float = -1
    mix: str = "halved"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.spatial) != 2:
            raise ValueError(
                f"image_size must be an int or (height, width) for an SRMUNet, which is a network of images, got "
                f"{self.image_size}"
            )
        for name in ("num_head_channels", "t_emb_dim", "d_emb"):
            positive_int(name, getattr(self, name))
        for name in ("hid_dims", "attention"):  # JSON brings lists
            if not isinstance(getattr(self, name), (tuple, list)):
                raise ValueError(f"{name} must be a tuple, got {getattr(self, name)!r:.80}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not 1 <= len(getattr(self, name)) <= MAX_RESOLUTIONS:
                raise ValueError(
                    f"{name} must be of 1 to {MAX_RESOLUTIONS} resolutions, got {len(getattr(self, name))}"
                )
        positive_int("num_blocks", self.num_blocks, MAX_BLOCKS)
        object.__setattr__(self, "level_scale", checks.number("level_scale", self.level_scale, -1e9))
        object.__setattr__(self, "level_shift", checks.number("level_shift", self.level_shift, -1e9))
        if self.mix not in ("halved", "raw"):
            raise ValueError(f"mix must be 'halved' or 'raw', got {self.mix!r:.80}")
        if self.d_emb % 2:
            raise ValueError(f"d_emb must be even, got {self.d_emb}")
        if any(positive_int("hid_dims", dim) % GROUPS for dim in self.hid_dims):
            raise ValueError(f"hid_dims must be multiples of {GROUPS}, one for each resolution, got {self.hid_dims}")
        if len(self.attention) != len(self.hid_dims) or any(not isinstance(flag, bool) for flag in self.attention):
            raise ValueError(f"attention must be {len(self.hid_dims)} bools, got {self.attention}")
        attending = {self.hid_dims[-1], *(d for d, flag in zip(self.hid_dims, self.attention, strict=True) if flag)}
        if any(dim % self.num_head_channels for dim in attending):
            raise ValueError(f"num_head_channels must divide {sorted(attending)}, got {self.num_head_channels}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them; without the last ones at their defaults, as older files are."""
        fields = super().to_dict()
        for name, default in (("level_scale", 1000), ("level_shift", -1), ("mix", "halved")):
            if fields[name] == default:
                del fields[name]
        return fields

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) of each resolution's feature maps."""
        height, width = self.spatial
        sizes = [(height, width)]
        for _ in self.hid_dims[1:]:
            height, width = -(-height // 2), -(-width // 2)
            sizes.append((height, width))
        return sizes

    @property
    def map_numel(self) -> int:
        """An estimate of the numbers in the feature maps of one sample that are in memory at the same time."""
        pixels = self._map_pixels
        skips = sum(dim * count * (self.num_blocks + 1) for dim, count in zip(self.hid_dims, pixels, strict=True))
        widest = (self.hid_dims[0] + self.hid_dims[min(1, len(self.hid_dims) - 1)]) * pixels[0]
        return skips + 4 * widest  # a concatenation, its norm, and a convolution's input and output

    @property
    def widest_numel(self) -> int:
        """The numbers in one sample's largest feature map: a map of the decoder concatenated with its skip."""
        dims = self.hid_dims
        below = (*dims[1:], dims[-1])
        return max((max(d, b) + d) * count for d, b, count in zip(dims, below, self._map_pixels, strict=True))

    @property
    def _map_pixels(self) -> list[int]:
        return [height * width for height, width in self.map_sizes]


# The networks of Wewer et al. 2025, with the schedules of Kang et al. 2026, table 1.
PRESETS = {
    "even_pixels": SRMUNetConfig(
        channels=3,
        image_size=32,
        patch_size=4,
        hid_dims=(64, 128, 128, 256),
        attention=(False, False, True, True),
        generate_schedule=(30, 0.9),
        refine_schedule=(30, 0.9),
    ),
    "counting_polygons": SRMUNetConfig(
        channels=3,
        image_size=128,
        patch_size=8,
        hid_dims=(128, 128, 256, 256, 512),
        attention=(False, False, False, True, True),
        generate_schedule=(10, 0.9),
        refine_schedule=(10, 0.9),
    ),
    "mnist_sudoku": SRMUNetConfig(
        channels=1,
        image_size=252,
        patch_size=28,
        hid_dims=(128, 128, 256, 256, 512, 512),
        attention=(False, False, False, False, True, True),
        generate_schedule=(3, 0.0),
        refine_schedule=(10, 0.8),
    ),
}
