"""The configuration of a TokenTransformer."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ipr_fast.kernels.philox import MAX_PATCHES
from ipr_fast.models.model_config import LayersConfig, positive_int
from ipr_fast.sampling.tokens import Vocabulary


@dataclass(frozen=True)
class TokenTransformerConfig(LayersConfig):
    """The shape of a TokenTransformer.

    vocabulary_size, mask_id: as for `Vocabulary`. rows, columns: the N = rows * columns positions; a text has one row.

    Raises ValueError, naming the field.
    """

    _: KW_ONLY
    vocabulary_size: int
    mask_id: int
    rows: int = 1
    columns: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            positive_int(name, getattr(self, name), MAX_PATCHES)
        if self.length > MAX_PATCHES:
            raise ValueError(
                f"columns: must give at most {MAX_PATCHES} positions, which is what the random numbers' counters hold, "
                f"got {self.rows} x {self.columns}"
            )
        self.check_layers(self.rows, self.columns)
        try:
            self.vocabulary  # noqa: B018 - raises
        except ValueError as error:
            raise ValueError(f"vocabulary_size and mask_id: {error}") from error

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocabulary_size, self.mask_id)

    @property
    def length(self) -> int:
        """N, the number of positions."""
        return self.rows * self.columns

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(N,)."""
        return (self.length,)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can store them."""
        return asdict(self)
