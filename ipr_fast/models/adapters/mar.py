"""Masked autoregressive models with a diffusion head (MAR, Li et al. 2024) as Denoisers.

The backbone looks at the patches that are given and says, for every masked one, what the head is conditioned on; the
head, a small network, denoises each patch by itself. So the backbone runs once an iteration, in `prepare`, and a step
costs the head alone. Patches of one iteration are independent given the others, as those of one step of MAR are.

Source: Li, Tian, Li, Deng, He 2024, "Autoregressive Image Generation without Vector Quantization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.sampling.condition import Conditioning
from ipr_fast.sampling.patches import ActivePatches, Grid
from ipr_fast.sampling.prediction import Prediction


class MARDenoiser(nn.Module):
    """A Denoiser of a backbone and a diffusion head.

    backbone: called as backbone(patches, masked) with patches (B, N, P), 0 where masked, and masked (B, N) bool;
        returns z (B, N, D). With a condition, backbone(patches, masked, condition).
    head: called as head(x, time, z) with noisy patches (M, P), their times (M,) and z (M, D); returns what it predicts,
        (M, P), or (M, 2 P) of a head that predicts variances too, which are not used.
    grid: how samples are divided into patches. is_conditional: the backbone takes a condition.

    The times are levels and the prediction is the velocity eps - x of rectified flow; a head that predicts the noise of
    another flow goes into `Parameterised(MARDenoiser(...), "eps", flow, ...)`.
    """

    def __init__(
        self, backbone: Callable[..., Tensor], head: Callable[..., Tensor], grid: Grid, *, is_conditional: bool = False
    ) -> None:
        super().__init__()
        for name, part in (("backbone", backbone), ("head", head)):
            if not callable(part):
                raise ValueError(f"{name} must be callable, got {type(part).__name__}")
        self.backbone, self.head, self.grid = backbone, head, grid
        self.is_conditional = checks.boolean("is_conditional", is_conditional)
        self.training = any(part.training for part in (backbone, head) if isinstance(part, nn.Module))

    def prepare(
        self,
        patches: Tensor,
        active: ActivePatches,
        out: Conditions | None = None,
        *,
        condition: Conditioning | None = None,
    ) -> Conditions:
        """Return what the head is conditioned on, from the patches that are not active."""
        if self.is_conditional != (condition is not None):
            needs = "must be given" if self.is_conditional else "must be None: is_conditional is False"
            raise ValueError(f"condition {needs}, got {checks.described(condition)}")
        masked = active.scatter(active.occupied, patches.shape[1], fill=False)
        given = () if condition is None else (condition,)
        z = self.backbone(patches.masked_fill(masked[..., None], 0.0), masked, *given)
        if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[:2] != patches.shape[:2]:
            expected = ", ".join(map(str, patches.shape[:2]))
            raise ValueError(f"backbone must return a tensor ({expected}, D), got {checks.described(z)}")
        if out is None:
            return Conditions(z)
        out.z.copy_(z)
        return out

    def forward(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        *,
        context: Conditions | None = None,
        condition: Conditioning | None = None,
    ) -> Prediction:
        """Predict the velocity of the active patches, by default of all."""
        if active is None:
            active = ActivePatches.from_mask(torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))
        z = (self.prepare(patches, active, condition=condition) if context is None else context).z
        x, of_slots = active.gather(patches), active.gather(z)
        made: Any = self.head(x.flatten(0, 1), levels.flatten(), of_slots.flatten(0, 1))
        numel, rows = patches.shape[2], levels.numel()
        if not isinstance(made, Tensor) or tuple(made.shape) not in ((rows, numel), (rows, 2 * numel)):
            raise ValueError(f"head must return a tensor ({rows}, {numel}), got {checks.described(made)}")
        return Prediction(made[:, :numel].unflatten(0, levels.shape))


class Conditions:
    """The context of an iteration: z (B, N, D)."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def first(self, chains: int) -> Conditions:
        return Conditions(self.z[:chains])
