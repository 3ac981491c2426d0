"""A step of a model's own sampler, with which `check_model` compares a step of the engine's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.condition import Condition, call_arguments
from ipr_fast.sampling.flow import posterior_step
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import as_taken

TOLERANCE = 1e-4  # of the largest number


class GoldenStep(NamedTuple):
    """A deterministic step (eta = 0, as of Euler or DDIM) that a model's own library has computed for B samples.

    x, next_x (B, *sample_shape): the samples before and after it, in rectified flow: z = (1 - t) x + t eps.
    levels, next_levels (B, N) or (B, *grid_shape): t of each patch before and after it, next_levels <= levels.
    """

    x: Tensor
    levels: Tensor
    next_levels: Tensor
    next_x: Tensor

    def check(self, model: Any, condition: Condition | None, device: torch.device) -> None:
        """Raise ValueError unless a step by this model's prediction ends there, up to 1e-4 of the largest number."""
        grid = model.grid
        for name in ("x", "next_x"):
            value = checks.samples(f"golden: {name}", getattr(self, name), grid.sample_shape)
            if checks.extremes(f"golden: {name}", value) is None or len(value) != len(self.x):
                raise ValueError(
                    f"golden: x and next_x must have the same number of samples, at least 1, got {name} of {len(value)}"
                )
        z, expected = (grid.to_patches(each.to(device, torch.float32)) for each in (self.x, self.next_x))
        shapes = list(dict.fromkeys([(len(z), grid.num_patches), (len(z), *grid.grid_shape)]))
        for name in ("levels", "next_levels"):
            value = getattr(self, name)
            if tuple(value.shape) not in shapes or not value.is_floating_point():
                allowed_shapes = " or ".join(map(str, shapes))
                raise ValueError(f"golden: {name} must be floats {allowed_shapes}, got {checks.described(value)}")
        t, s = (each.to(device, torch.float32).reshape(z.shape[:2]) for each in (self.levels, self.next_levels))
        if not bool(((s <= t) & (s >= 0) & (t <= 1)).all()):
            raise ValueError("golden: levels must be in [0, 1], and next_levels no larger than they are")
        active = ActivePatches.from_mask(t > 0)
        made = model(as_taken(model, z), active.gather(t), active, **call_arguments(condition))
        velocity, noise = active.scatter(made.velocity.float(), grid.num_patches), torch.zeros_like(z)
        found = posterior_step(z, velocity, None, t[..., None], s[..., None], noise, eta=0.0)
        error, moved = (found - expected).abs().max(), (z - expected).abs().max()
        allowed = TOLERANCE * expected.abs().max().clamp_min(1)
        if moved <= allowed:  # a step that a model of the wrong sign would pass
            raise ValueError(f"golden: the step must move x by more than {allowed:.2g}, got {moved:.2g}")
        if not error <= allowed:
            raise ValueError(
                f"next_x differs by {error:.2g}, expected at most {allowed:.2g}; the step moves x by {moved:.2g}. Does "
                "the model predict eps - x, and take the levels in its own units?"
            )


def check_golden(golden: object, rows: int | None) -> GoldenStep | None:
    """Return a golden step, or None. rows: of the condition, which it must have too."""
    if golden is None:
        return None
    if not isinstance(golden, GoldenStep) or not all(isinstance(each, Tensor) for each in golden):
        raise ValueError(f"golden must be an ipr_fast.GoldenStep of tensors, got {checks.name_of(golden)}")
    if rows is not None and golden.x.shape[:1] != (rows,):
        raise ValueError(
            f"golden: x must have {rows} samples, those of the condition, got shape {tuple(golden.x.shape)}"
        )
    return golden
