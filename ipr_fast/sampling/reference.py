"""The algorithm as it is defined, for one chain, slowly: the specification that tests compare the engine with.

Nothing here is shared with the engine but the model, the schedule's integers and the definition of the random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ipr_fast.kernels import philox
from ipr_fast.kernels.renoise import choose_patches
from ipr_fast.sampling import flow, user_code
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction, mix_range
from ipr_fast.sampling.schedule import Sampling, Schedule
from ipr_fast.sampling.selection import Selection

Model = Callable[..., Prediction]  # an `ipr_fast.Denoiser`
Noise = Callable[[int], Tensor]
Predict = Callable[[Tensor, Tensor, Tensor], Prediction]


def regenerate(
    model: Model,
    patches: Tensor,
    unknown: Tensor,
    schedule: Schedule,
    *,
    stochasticity: float,
    temperature: float = 1.0,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """Denoise the unknown patches of one chain from pure noise, given the others.

    patches (N, P): the unknown ones hold noise already. unknown (N,) bool. noise(step) -> (N, P), the posterior noise.
    Returns the patches (N, P) and the levels (T + 1, N) before the first and after each step.
    """
    if patches.ndim != 2 or unknown.shape != patches.shape[:1] or unknown.dtype != torch.bool:
        came = f"{tuple(patches.shape)} and {tuple(unknown.shape)} of {unknown.dtype}"
        raise ValueError(f"patches must be (N, P) and unknown a bool (N,), got {came}")
    user_code.check_eval_mode(model)
    sampling = Sampling(schedule, stochasticity, temperature)
    return _regenerate(partial(_predict, model), patches, unknown, sampling, noise)


@torch.no_grad()
def _regenerate(
    predict: Predict, patches: Tensor, unknown: Tensor, sampling: Sampling, noise: Noise
) -> tuple[Tensor, Tensor]:
    """See `regenerate`; predict(patches, level, unknown) is the model's call."""
    patches, schedule = patches.clone(), sampling.schedule
    num_active = int(unknown.sum())
    num_steps, block, starts = schedule.steps(num_active), schedule.block(num_active), schedule.starts(num_active)
    level = unknown.to(patches.dtype)
    started_at: dict[int, int] = {}
    waiting = unknown.nonzero().flatten().tolist()
    levels = [level]

    for step in range(num_steps):
        velocity, mix, log_variance = predict(patches, level, unknown)

        uncertainty = [0.0] * len(unknown) if log_variance is None else _finite(log_variance).tolist()
        for _ in range(starts.count(step)):
            certain = min(waiting, key=uncertainty.__getitem__)  # the first of equals
            waiting.remove(certain)
            started_at[certain] = step

        next_level = level.clone()
        for n, start in started_at.items():
            left = torch.tensor(block - (step + 1 - start), dtype=level.dtype, device=level.device)
            next_level[n] = left / block
        next_level = next_level.clamp(0, 1) if step + 1 < num_steps else torch.zeros_like(level)

        patches = flow.posterior_step(
            patches,
            velocity,
            mix,
            level[:, None],
            next_level[:, None],
            noise(step),
            eta=sampling.stochasticity,
            tau=sampling.temperature,
        )
        level = next_level
        levels.append(level)
    return patches, torch.stack(levels)


def _finite(log_variance: Tensor) -> Tensor:
    """NaN, as any uncertainty too large for a float, is the largest one."""
    return log_variance.nan_to_num(nan=torch.finfo(log_variance.dtype).max)


def _predict(model: Model, patches: Tensor, level: Tensor, unknown: Tensor) -> Prediction:
    """The model's prediction for one chain, spread over all N patches; 0 where the patch is not active."""
    active = ActivePatches.from_mask(unknown[None])
    patches, levels = patches[None], active.gather(level[None])
    inputs = {"patches": patches, "levels": levels, "active.index": active.index, "active.count": active.count}
    with user_code.model_call(model, **inputs):
        prediction = model(patches, levels, active)
    fields = (None if field is None else active.scatter(field.float(), len(unknown))[0] for field in prediction)
    return Prediction(*fields)


class ReferenceEngine:
    """Chains one after another through `regenerate`, with the engine's random numbers; slow, for comparison."""

    def __init__(self, model: Model, patches: Tensor, chain_ids: Tensor, sampling: Sampling) -> None:
        self.model, self.chain_ids, self.sampling = model, chain_ids, sampling
        self.patches = patches.float()
        self.mix_range: Tensor | None = None  # see `Engine.mix_range`
        self._called = False
        self.iteration = torch.zeros((), dtype=torch.int64, device=patches.device)

    def begin(self, iteration: int) -> None:
        """See `Engine.begin`."""
        self.iteration.fill_(iteration)

    def regenerate(
        self,
        selection: Selection,
        *,
        initial: bool = False,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """See `Engine.regenerate`."""
        mask = selection.mask
        if selection.choice is not None:
            mask.copy_(choose_patches(selection.choice, seed=self.sampling.seed, chain_ids=self.chain_ids))
        as_initial = initial or self.sampling.fixed_noise
        refined = [self._regenerate_chain(chain, mask[chain], as_initial) for chain in range(len(mask))]
        self.patches = torch.stack(refined) if refined else self.patches
        for _ in range(self.num_steps(selection.counts) if on_step is not None else 0):
            on_step()

    def notice_changes(self) -> None:
        """See `Engine.notice_changes`: here, nothing is kept."""

    def num_steps(self, counts: Tensor) -> int:
        """See `Engine.num_steps`."""
        return self.sampling.schedule.steps(max(counts.tolist(), default=0))

    def _regenerate_chain(self, chain: int, unknown: Tensor, as_initial: bool) -> Tensor:
        patches, sampling = self.patches[chain], self.sampling

        def normals(stream: int, step: int, iteration: Tensor | int) -> Tensor:
            ids = torch.arange(len(patches), device=patches.device)[None]
            chain_id, numel = self.chain_ids[chain : chain + 1], patches.shape[-1]
            return philox.patch_normals(sampling.seed, stream, step, iteration, chain_id, ids, numel)[0]

        if as_initial:
            fresh = normals(philox.STREAM_INITIAL, 0, 0)
        else:
            fresh = normals(philox.STREAM_RENOISE, 0, self.iteration)
        noised = torch.where(unknown[:, None], fresh, patches)
        posterior = partial(normals, philox.STREAM_POSTERIOR, iteration=self.iteration)
        return _regenerate(self._predict, noised, unknown, sampling, posterior)[0]

    def _predict(self, patches: Tensor, level: Tensor, unknown: Tensor) -> Prediction:
        prediction = _predict(self.model, patches, level, unknown)
        if not self._called:
            mix = None if prediction.variance_mix is None else prediction.variance_mix[None]
            self._called, self.mix_range = True, mix_range(mix, unknown[None])
        return prediction
