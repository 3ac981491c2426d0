"""The algorithm's definition, one chain and one patch at a time: the specification that tests compare the engine with.

It shares with the engine only the model, the schedule's integers and the definition of the random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast.kernels import philox
from ipr_fast.kernels.renoise import choose_patches
from ipr_fast.sampling import flow, user_code
from ipr_fast.sampling.condition import Condition, call_arguments
from ipr_fast.sampling.patches import ActivePatches, waiting_slots
from ipr_fast.sampling.prediction import Prediction, as_taken, mix_range, preserves_variance
from ipr_fast.sampling.schedule import Sampling, Schedule
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.signals import Signals, check_log_variance

Model = Callable[..., Prediction]  # an `ipr_fast.Denoiser`
Noise = Callable[[int], Tensor]
Predict = Callable[[Tensor, Tensor, Tensor], Prediction]


class Standing(NamedTuple):
    """Where a regeneration of one chain stands before a step.

    step: the next one. level (N,): of every patch. started: the step at which a patch started, of those that did.
    told: the log-variances that the model predicted of a patch in the steps that have denoised it.
    """

    step: int
    level: Tensor
    started: dict[int, int]
    told: dict[int, list[Tensor]] = {}  # noqa: RUF012 - never written to


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
    Returns the patches (N, P) and the levels (T + 1, N): those before the first step and after each step.
    """
    if patches.ndim != 2 or unknown.shape != patches.shape[:1] or unknown.dtype != torch.bool:
        got = f"{tuple(patches.shape)} and {tuple(unknown.shape)} of {unknown.dtype}"
        raise ValueError(f"patches must be (N, P) and unknown a bool (N,), got {got}")
    user_code.check_eval_mode(model)
    sampling = Sampling(schedule, stochasticity, temperature)
    start = Standing(0, unknown.to(patches.dtype), {})
    predict, preserving = partial(_predict, model), preserves_variance(model)
    patches, levels, _ = _regenerate(predict, patches, unknown, sampling, noise, start, preserving=preserving)
    return patches, levels


@torch.no_grad()
def _regenerate(
    predict: Predict,
    patches: Tensor,
    unknown: Tensor,
    sampling: Sampling,
    noise: Noise,
    standing: Standing,
    steps: int | None = None,
    *,
    preserving: bool,
) -> tuple[Tensor, Tensor, Standing]:
    """See `regenerate`; predict(patches, level, unknown) calls the model. Goes on from `standing`, for `steps` steps.

    Returns where it stands, too.
    """
    patches, schedule = patches.clone(), sampling.schedule
    num_active = int(unknown.sum())
    num_steps, block, starts = schedule.steps(num_active), schedule.block(num_active), schedule.starts(num_active)
    level, started_at = standing.level, dict(standing.started)
    told = {patch: list(standing.told.get(patch, ())) for patch in range(len(unknown))}
    waiting = [patch for patch in unknown.nonzero().flatten().tolist() if patch not in started_at]
    levels, end = [level], num_steps if steps is None else standing.step + steps

    for step in range(standing.step, end):
        velocity, mix, log_variance = predict(patches, level, unknown)

        # At s = S_k the waiting patch with the lowest log-variance starts, of equals the first.
        uncertainty = [0.0] * len(unknown) if log_variance is None else _nan_as_largest(log_variance).tolist()
        for _ in range(starts.count(step)):
            most_certain = min(waiting, key=uncertainty.__getitem__)
            waiting.remove(most_certain)
            started_at[most_certain] = step

        # A patch started at step b has level (L - (s + 1 - b)) / L after step s, warped by the shift; after the last
        # step all are clean.
        next_level = level.clone()
        for patch, start in started_at.items():
            steps_left = torch.tensor(block - (step + 1 - start), dtype=level.dtype, device=level.device)
            next_level[patch] = schedule.warp((steps_left / block).clamp(0, 1))
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
            preserving=preserving,
        )
        for patch in started_at:
            if log_variance is not None and level[patch] > 0:
                told[patch].append(log_variance[patch])
        level = next_level
        levels.append(level)
    return patches, torch.stack(levels), Standing(end, level, started_at, told)


def _nan_as_largest(log_variance: Tensor) -> Tensor:
    """Replace NaN and infinity by the largest number: patches of undefined uncertainty start last."""
    return log_variance.nan_to_num(nan=torch.finfo(log_variance.dtype).max)


def _predict(
    model: Model, patches: Tensor, level: Tensor, unknown: Tensor, condition: Condition | None = None
) -> Prediction:
    """Call the model for one chain and scatter its prediction to all N patches, with 0 in inactive ones."""
    active = ActivePatches.from_mask(unknown[None])
    patches, levels = patches[None], active.gather(level[None])
    inputs = {"patches": patches, "levels": levels, "active.index": active.index, "active.count": active.count}
    with user_code.model_call(model, **inputs, **({} if condition is None else condition.named)):
        prediction = model(as_taken(model, patches), levels, active, **call_arguments(condition))
    return prediction.map(lambda field: active.scatter(field.float(), len(unknown))[0])


class ReferenceEngine:
    """Runs chains one after another through `regenerate`, with the engine's random numbers and its interface."""

    dtype, num_signals = torch.float32, 1

    def __init__(
        self,
        model: Any,
        values: Tensor,
        chain_ids: Tensor,
        sampling: Any,
        condition: Condition | None = None,
        signals: bool = False,
    ) -> None:
        self.signals = Signals.unknown(self.num_signals, values.shape[:2], values.device) if signals else None
        self.model, self.chain_ids, self.sampling, self.condition = model, chain_ids, sampling, condition
        self.values = values.to(self.dtype, copy=True)
        self.mix_range: Tensor | None = None  # see `Engine.mix_range`
        self._is_first_call = True
        self.iteration = torch.zeros((), dtype=torch.int64, device=values.device)

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
        use_initial_noise = initial or self.sampling.fixed_noise
        refined = [self._regenerate_chain(chain, mask[chain], use_initial_noise) for chain in range(len(mask))]
        self.values = torch.stack(refined) if refined else self.values
        if on_step is not None:
            for _ in range(self.num_steps(selection.counts)):
                on_step()

    def begin_slots(self, selection: Selection) -> tuple[Tensor, ...]:
        """See `Engine.begin_slots`."""
        return waiting_slots(selection.mask, max(selection.counts.tolist()))

    def resume(
        self,
        selection: Selection,
        first: Tensor,
        steps: Tensor,
        slots: tuple[Tensor, ...] = (),
        *,
        initial: bool = True,
        on_share: Callable[[float], object] | None = None,
    ) -> None:
        """See `Engine.resume`; slots: level and start, as in `PatchLanes.carried`."""
        for chain, (begin, number) in enumerate(zip(first.tolist(), steps.tolist(), strict=True)):
            if number:
                self._resume_chain(chain, selection.mask[chain], begin, number, tuple(s[chain] for s in slots), initial)
        if on_share is not None:
            on_share(1.0)

    def _resume_chain(
        self, chain: int, unknown: Tensor, begin: int, number: int, slots: tuple[Tensor, ...], initial: bool
    ) -> None:
        """Do these steps of a chain; update its values, and its slots (A,)."""
        level, start = slots
        ids = unknown.nonzero().flatten()
        started = {n: s for n, s in zip(ids.tolist(), start[: len(ids)].tolist(), strict=True) if s >= 0}
        levels = torch.zeros(len(unknown), dtype=level.dtype, device=level.device).index_copy_(
            0, ids, level[: len(ids)]
        )
        waits = unknown.index_copy(0, ids, start[: len(ids)] < 0)
        self.values[chain], _, standing = self._steps_of(
            chain, unknown, waits, initial, Standing(begin, levels, started), number
        )
        level[: len(ids)] = standing.level[ids]
        start[: len(ids)] = torch.tensor([standing.started.get(n, -1) for n in ids.tolist()], device=start.device)

    def notice_changes(self) -> None:
        """See `Engine.notice_changes`; the reference keeps nothing between calls of the model."""

    def num_steps(self, counts: Tensor) -> int:
        """See `Engine.num_steps`."""
        return self.sampling.num_steps(max(counts.tolist(), default=0))

    def _regenerate_chain(self, chain: int, unknown: Tensor, use_initial_noise: bool) -> Tensor:
        start = Standing(0, unknown.to(self.dtype), {})
        patches, _, end = self._steps_of(chain, unknown, unknown, use_initial_noise, start)
        if self.signals is not None:
            for patch, told in end.told.items():
                if told:
                    largest = torch.finfo(torch.float32).max  # in place of an infinite one
                    each = torch.stack(told).double().clamp(-largest, largest)
                    self.signals.uncertainty[chain, patch] = each.mean()
        return patches

    def _steps_of(
        self,
        chain: int,
        unknown: Tensor,
        waits: Tensor,
        use_initial_noise: bool,
        standing: Standing,
        steps: int | None = None,
    ) -> tuple[Tensor, Tensor, Standing]:
        """Replace the patches that wait (N,) by noise and do a chain's steps: see `_regenerate`."""
        patches, sampling = self.values[chain], self.sampling

        def normals(stream: int, step: int, iteration: Tensor | int) -> Tensor:
            ids = torch.arange(len(patches), device=patches.device)[None]
            chain_id, numel = self.chain_ids[chain : chain + 1], patches.shape[-1]
            return philox.patch_normals(sampling.seed, stream, step, iteration, chain_id, ids, numel)[0]

        if use_initial_noise:
            fresh = normals(philox.STREAM_INITIAL, 0, 0)
        else:
            fresh = normals(philox.STREAM_RENOISE, 0, self.iteration)
        noised = torch.where(waits[:, None], fresh, patches)
        posterior = partial(normals, philox.STREAM_POSTERIOR, iteration=self.iteration)
        predict = partial(self._predict, self._condition_of(chain))
        preserving = preserves_variance(self.model)
        return _regenerate(predict, noised, unknown, sampling, posterior, standing, steps, preserving=preserving)

    def _condition_of(self, chain: int) -> Condition | None:
        return None if self.condition is None else self.condition.map(lambda tensor: tensor[chain : chain + 1])

    def _predict(self, condition: Condition | None, patches: Tensor, level: Tensor, unknown: Tensor) -> Prediction:
        prediction = _predict(self.model, patches, level, unknown, condition)
        if self.signals is not None:
            check_log_variance(self.model, prediction.log_variance)
        if self._is_first_call:
            mix = None if prediction.variance_mix is None else prediction.variance_mix[None]
            self._is_first_call, self.mix_range = False, mix_range(mix, unknown[None])
        return prediction
