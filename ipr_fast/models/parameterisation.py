"""Networks that predict noise, clean samples or v, of rectified, cosine and variance-preserving flows, as Denoisers.

With z = a x + b eps at the network's time, its level is t = b / (a + b) and its state (a + b) times the engine's:

    velocity  dz/dtime                    eps  the noise
    x0        the clean sample            v    a eps - b x     (Salimans and Ho 2022)

From a prediction follow x0 and eps, and u = eps - x0. Near pure noise eps tells nothing of x: x0 = (z - b eps) / a. So
levels above the largest that the network was trained for are computed there, with the noise in z scaled down to it, and
u is that of the x0 found: u = (z - x0) / t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.models import contract
from ipr_fast.models.flows import Flow, RectifiedFlow
from ipr_fast.sampling.condition import Conditioning
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction, as_taken

PREDICTIONS = ("velocity", "eps", "x0", "v")
OPTIONAL = ("generate_schedule", "refine_schedule", "value_range", "mix_bounds")
SMALLEST = 2.0**-24  # a level below all of a schedule; keeps the arithmetic of idle slots finite


class Parameterised(nn.Module):
    """A Denoiser of a network that predicts in its own convention.

    model: has a `grid` and is called as a Denoiser, as model(patches, times, active): with patches in the scale of its
        flow, and the network's times (B, A) or (B, N). It returns what it predicts (B, A or N, P), as a Tensor or as
        the `velocity` of a Prediction. Context patches are clean, in their own scale. May take `condition=`, and may
        have `prepare`; `tabulate` is not used.
    prediction: "velocity", "eps", "x0" or "v".
    flow: the process that it was trained with, by default rectified flow.
    time_scale, time_shift: the network gets time_scale * time + time_shift: 1000 for a network of times in 0..1000.
    max_level: the largest level t that it was trained for, in (0, 1]; by default its flow's last one. "eps" needs one
        below 1.

    Raises ValueError, naming the argument.
    """

    patch_dtype = torch.float32  # the network's are in the type of its weights

    def __init__(
        self,
        model: Any,
        prediction: str = "velocity",
        flow: Flow | None = None,
        *,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
        max_level: float | None = None,
    ) -> None:
        super().__init__()
        contract.denoiser(model)
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        flow = RectifiedFlow() if flow is None else flow
        if not isinstance(flow, Flow):
            raise ValueError(f"flow must be a Flow of ipr_fast.models.flows, got {type(flow).__name__}")
        if prediction == "velocity" and flow.speed is None:
            raise ValueError(f"prediction must be one of eps, x0, v for a {type(flow).__name__}, got 'velocity'")
        self.model, self.prediction, self.flow = model, prediction, flow
        self.time_scale = checks.number("time_scale", time_scale, -1e9)
        self.time_shift = checks.number("time_shift", time_shift, -1e9)
        self.max_level = flow.max_level if max_level is None else checks.number("max_level", max_level, 1e-6, 1)
        if prediction == "eps" and self.max_level > 1 - 2**-20:
            raise ValueError(
                "max_level must be given, the largest level < 1 that the network was trained for: at level 1 the noise "
                f"tells nothing of the sample, and the last level of {type(flow).__name__} is {self.max_level:.8g}"
            )
        self.preserves_variance = flow.preserves_variance
        for name in ("grid", *(name for name in OPTIONAL if hasattr(model, name))):
            setattr(self, name, getattr(model, name))
        on = contract.device_of(model)
        if on is not None:
            self.flow.to(on)

    def forward(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        *,
        condition: Conditioning | None = None,
        context: Any = None,
    ) -> Prediction:
        """Predict the velocity of rectified flow, eps - x."""
        contract.condition(self.model, given=condition is not None)
        options = {} if condition is None else {"condition": condition}
        options |= {} if context is None else {"context": context}
        t = levels.clamp(max=self.max_level)
        factor = self.flow.scale(t) * torch.where(levels > t, t / levels, 1.0)  # of the network's state to the engine's
        of_patches = factor if active is None else active.scatter(factor, patches.shape[1], fill=1.0)
        made = self.model(as_taken(self.model, patches * of_patches[..., None]), self.times(t), active, **options)
        found = made if isinstance(made, Prediction) else Prediction(made)
        contract.prediction(found, (*levels.shape, patches.shape[2]), patches.shape[1])
        z = patches if active is None else active.gather(patches)
        return found._replace(velocity=self._velocity(found.velocity.float(), z, levels[..., None], t[..., None]))

    def times(self, levels: Tensor) -> Tensor:
        """Return what the network gets as the times of levels."""
        return self.time_scale * self.flow.time(levels) + self.time_shift

    @property
    def prepare(self) -> Callable[..., Any] | None:
        """The model's `prepare`; None where it has none."""
        return self.model.prepare if contract.prepares(self.model) else None

    def _velocity(self, predicted: Tensor, z: Tensor, level: Tensor, t: Tensor) -> Tensor:
        """Return eps - x0 of a prediction (B, n, P) made at levels t <= level (B, n, 1), for the engine's z."""
        above = level > t
        at_t = z * torch.where(above, t / level.clamp_min(SMALLEST), 1.0)
        if self.prediction == "eps":
            u = (predicted - at_t) / (1 - t)
        elif self.prediction == "x0":
            u = (at_t - predicted) / t.clamp_min(SMALLEST)
        elif self.prediction == "velocity" and not self.flow.preserves_variance:
            u = predicted
        else:
            a, b = 1 - t, t  # in units of a + b, of which z and v are multiples too
            v = predicted if self.prediction == "v" or self.flow.speed is None else predicted / self.flow.speed
            u = ((b - a) * at_t + v / self.flow.scale(t)) / (a.square() + b.square())
        clean = at_t - t * u
        return torch.where(above, (z - clean) / level.clamp_min(SMALLEST), u)
