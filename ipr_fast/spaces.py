"""What the samples of a call are: floats, divided into patches, for a Denoiser, or tokens for a TokenDenoiser.

A space checks samples, turns them into the engine's values (B, N, ...) and back, and makes the sampling settings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.schedule import Sampling, Schedule
from ipr_fast.sampling.tokens import TokenSampling, TokenSchedule

MOST_TEMPERATURE = 1000.0  # far more noise than any model was trained on; beyond, its float32 overflows
DEFAULT_REFINE_SCHEDULE = Schedule(10, 0.8)
DEFAULT_GENERATE_SCHEDULE = Schedule(3, 0.0)
DEFAULTS = {"generate_schedule": DEFAULT_GENERATE_SCHEDULE, "refine_schedule": DEFAULT_REFINE_SCHEDULE}


class PatchSpace:
    """Samples (B, *sample_shape) of a Denoiser. Raises ValueError for a model that is none."""

    dtype = torch.float32

    def __init__(self, model: Denoiser) -> None:
        self.model, self.grid = model, contract.denoiser(model)
        self.sample_shape = tuple(self.grid.sample_shape)
        self.sample_bytes = 4 * math.prod(self.sample_shape)

    def check(self, name: str, x: object) -> Tensor:
        """Check the type and the shape of samples."""
        return checks.samples(name, x, self.sample_shape)

    def complaint(self, name: str, x: Tensor, ignored: Tensor | None = None) -> str | None:
        """Check that samples are finite; return a warning if their range is not the model's.

        ignored: (B, N) bool, patches whose values do not matter.
        """
        known = x if ignored is None else self.own_values(x, ignored)
        return contract.range_complaint(name, checks.extremes(name, known), self.model, whole=ignored is None)

    def sampling(
        self, schedule: object, default: str, stochasticity: float, temperature: float, seed: int, noise: object
    ) -> Sampling:
        """Return the settings of a call. default: the model's attribute that has its schedule."""
        name = "schedule"
        if schedule is None:
            name, schedule = f"model: {default}", getattr(self.model, default, None) or DEFAULTS[default]
        if not isinstance(schedule, Schedule):
            raise ValueError(f"{name} must be an ipr_fast.Schedule, got {type(schedule).__name__}")
        if not isinstance(noise, str) or noise not in ("random", "fixed"):
            raise ValueError(f'noise must be "random" or "fixed", got {noise!r}')
        return Sampling(
            schedule,
            checks.number("stochasticity", stochasticity, 0, 1),
            checks.number("temperature", temperature, 0, MOST_TEMPERATURE),
            checks.integer("seed", seed, 0, 2**64 - 1),
            noise == "fixed",
        )

    def own_values(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Return samples as values of the engine (B, N, P), which user code cannot reach; 0 where ignored (B, N)."""
        patches = self.grid.to_patches(x)
        if ignored is not None:
            return patches.masked_fill(ignored[..., None], patches.new_zeros(()))
        return patches.clone() if patches.untyped_storage()._cdata == x.untyped_storage()._cdata else patches

    def to_samples(self, values: Tensor, original: Tensor, changed: Tensor) -> Tensor:
        """Return samples with these values where `changed` (B, N), in the type of the original values."""
        return self.grid.to_images(torch.where(changed[..., None], values.to(original.dtype), original))

    def bad_samples(self, x: Tensor) -> str | None:
        """Return a warning if samples that a model made are not finite."""
        bad = checks.count_not_finite(x) if len(x) else 0
        return f"{bad} of {len(x)} samples have NaN or inf, from the model's predictions" if bad else None


class TokenSpace:
    """Tokens (B, N) of a TokenDenoiser. Raises ValueError for a model that is none."""

    dtype = torch.int64

    def __init__(self, model: TokenDenoiser) -> None:
        self.model, self.grid, self.vocabulary = model, contract.token_denoiser(model), model.vocabulary
        self.sample_shape: tuple[int, ...] = (self.grid.length,)
        self.sample_bytes = 8 * self.grid.length

    def check(self, name: str, x: object) -> Tensor:
        """Check the type and the shape of samples."""
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 2 or x.shape[1] != self.grid.length:
            raise ValueError(
                f"{name} must be int64 tokens (B, {self.grid.length}) to fit the model, got {checks.described(x)}"
            )
        if x.device.type == "meta":
            raise ValueError(f"{name} must hold data, got a tensor on the meta device")
        return x

    def complaint(self, name: str, x: Tensor, ignored: Tensor | None = None) -> str | None:
        """Check that tokens are in the vocabulary and not the mask. ignored: (B, N) bool, positions that may be."""
        size, mask_id = self.vocabulary.size, self.vocabulary.mask_id
        tokens = x if ignored is None else x[~ignored]
        outside = (tokens < 0) | (tokens >= size)
        masked = tokens == mask_id
        if bool((outside & ~masked).any()):
            raise ValueError(f"{name} must have tokens in 0..{size - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        if bool(masked.any()):
            raise ValueError(f"{name} must have no masked positions, got mask_id {mask_id} at {int(masked.sum())}")
        return None

    def sampling(
        self, schedule: object, default: str, stochasticity: float, temperature: float, seed: int, noise: object
    ) -> TokenSampling:
        """Return the settings of a call. default: the model's attribute that has its schedule."""
        for name, value, usual in (
            ("stochasticity", stochasticity, 0.5),
            ("temperature", temperature, 1.0),
            ("noise", noise, "random"),
        ):
            if not isinstance(value, (int, float, str)) or value != usual:
                hint = "; TokenSchedule has a temperature" if name == "temperature" else ""
                raise ValueError(f"{name} must be left at {usual!r} for a model of tokens, got {value!r}{hint}")
        name = "schedule"
        if schedule is None:
            name, schedule = f"model: {default}", getattr(self.model, default, None) or TokenSchedule()
        if not isinstance(schedule, TokenSchedule):
            raise ValueError(
                f"{name} must be an ipr_fast.TokenSchedule for a model of tokens, got {type(schedule).__name__}"
            )
        return TokenSampling(schedule, checks.integer("seed", seed, 0, 2**64 - 1))

    def own_values(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Return samples as values of the engine (B, N), which user code cannot reach; 0 where ignored (B, N)."""
        return x.clone() if ignored is None else x.masked_fill(ignored, 0)

    def to_samples(self, values: Tensor, original: Tensor, changed: Tensor) -> Tensor:
        """Return samples with these values where `changed` (B, N)."""
        return torch.where(changed, values, original)

    def bad_samples(self, x: Tensor) -> str | None:
        """Return a warning if positions are still masked, for which the model's logits had no maximum."""
        bad = int((x == self.vocabulary.mask_id).any(1).sum()) if len(x) else 0
        return (
            f"{bad} of {len(x)} samples have masked positions, where the model's logits are NaN or inf" if bad else None
        )


Space = PatchSpace | TokenSpace


def space_of(model: Any) -> Space:
    """Return the space of a model's samples."""
    return TokenSpace(model) if contract.is_token_denoiser(model) else PatchSpace(model)


def regeneration_calls(space: Space, schedule: Schedule | TokenSchedule | None, default: str, active: Tensor) -> Tensor:
    """Return the model calls (R,) int64 of regenerations of so many active patches (R,).

    schedule: None for the model's own, which is its attribute `default`.
    """
    sampling = space.sampling(schedule, default, 0.5, 1.0, 0, "random")
    calls = [sampling.num_steps(n) for n in range(space.grid.num_patches + 1)]
    return torch.tensor(calls, device=active.device)[active]
