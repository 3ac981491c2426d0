"""The engine: all chains of a batch at once, on any device.

A regeneration is: take the active patches, replace them by noise, prepare the model, tick T times. Between the first
tick and the last nothing looks at the data from the host, no shape depends on data and all state lives in buffers
that are allocated once, so that a tick can be captured and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.advance import advance
from ipr_fast.kernels.denoise import denoise
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_RENOISE
from ipr_fast.kernels.renoise import PatchChoice, Slots, renoise
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.patches import ActivePatches
from ipr_fast.schedule import Schedule
from ipr_fast.trace import span


@dataclass(frozen=True)
class Sampling:
    """How to denoise: the schedule, eta, tau and the seed.

    fixed_noise: renoise a patch with its noise of the initial generation, every time the same.
    """

    schedule: Schedule
    stochasticity: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    fixed_noise: bool = False


class GivenNoise(NamedTuple):
    """Noise from elsewhere in place of the chains' own: what makes a run comparable with a recorded one.

    initial (B, N, P) replaces the active patches; posterior(step) gives (B, N, P) for each step.
    """

    initial: Tensor
    posterior: Callable[[int], Tensor]


@dataclass(frozen=True)
class SlotState:
    """The buffers of one regeneration with A slots a chain."""

    active: ActivePatches
    level: Tensor  # (B, A) float32
    next_level: Tensor  # (B, A) float32
    start: Tensor  # (B, A) int32, -1 while waiting

    @classmethod
    def allocate(cls, batch: int, slots: int, device: torch.device) -> SlotState:
        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        active = ActivePatches(buffer(batch, slots, dtype=torch.int32), buffer(batch, dtype=torch.int32))
        levels = (buffer(batch, slots, dtype=torch.float32) for _ in range(2))
        return cls(active, *levels, buffer(batch, slots, dtype=torch.int32))


@dataclass(frozen=True)
class ChainState:
    """The buffers of B chains."""

    patches: Tensor  # (B, N, P) float32
    chain_ids: Tensor  # (B,) int64
    step: Tensor  # () int64, of the regeneration under way
    iteration: Tensor  # () int64

    @classmethod
    def allocate(cls, patches: Tensor, chain_ids: Tensor) -> ChainState:
        device = patches.device
        counters = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        return cls(patches.float().contiguous(), chain_ids, *counters)


class Engine:
    """B chains under one model and one way of sampling.

    patches (B, N, P) are copied to float32; chain_ids (B,) int64 name the chains' random numbers. Everything is on one
    device.
    """

    def __init__(self, model: Denoiser, patches: Tensor, chain_ids: Tensor, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.chains = ChainState.allocate(patches.clone(), chain_ids)
        self.tables = sampling.schedule.tables(patches.shape[1]).to(patches.device)
        self._slots: dict[int, SlotState] = {}
        self._context: Any = None

    @property
    def patches(self) -> Tensor:
        """The chains as they are now, (B, N, P) float32: the engine's own buffer."""
        return self.chains.patches

    @property
    def iteration(self) -> Tensor:
        """The iteration's number as a scalar tensor on the device, for mask policies."""
        return self.chains.iteration

    def begin(self, iteration: int) -> None:
        """Set the iteration that the next random numbers belong to; 0 is the initial generation."""
        self.chains.iteration.fill_(iteration)

    @torch.inference_mode()
    def regenerate(
        self,
        mask: Tensor,
        most_active: int,
        *,
        slots: int | None = None,
        choice: PatchChoice | None = None,
        initial: bool = False,
        noise: GivenNoise | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """Replace the patches of `mask` (B, N) by noise and denoise them, given the others.

        most_active: a number that no chain's count of active patches exceeds; it sets the steps. slots: the slots to
        hold them, at least as many (the default), where counts vary and buffers should not. choice: choose the patches
        here, and write them into `mask`. initial: draw the initial noise in place of an iteration's. noise: in place of
        the chains' own. on_step: called after each step.
        """
        num_steps = self.sampling.schedule.steps(most_active)
        if num_steps == 0 or not len(mask):
            return
        state = self._slot_state(slots or most_active)
        self._renoise(mask, state, choice, initial, noise)
        self.chains.step.zero_()
        context = self._prepare(state)
        for step in range(num_steps):
            with span("tick"):
                self.tick(state, context, None if noise is None else noise.posterior(step))
            if on_step is not None:
                on_step()

    def tick(self, slots: SlotState, context: dict[str, Any], noise: Tensor | None = None) -> None:
        """One step: a denoiser call, the schedule, the update of the moving patches; `noise` (B, N, P) if given."""
        chains, sampling, active = self.chains, self.sampling, slots.active
        prediction = self.model(chains.patches, slots.level, active, **context)
        checks.prediction(prediction, (*slots.level.shape, chains.patches.shape[-1]))
        advance(
            slots.start,
            slots.next_level,
            count=active.count,
            step=chains.step,
            log_variance=prediction.log_variance,
            **self.tables._asdict(),
        )
        denoise(
            chains.patches,
            index=active.index,
            level=slots.level,
            next_level=slots.next_level,
            velocity=prediction.velocity,
            variance_mix=prediction.variance_mix,
            stochasticity=sampling.stochasticity,
            temperature=sampling.temperature,
            seed=sampling.seed,
            step=chains.step,
            iteration=chains.iteration,
            chain_ids=chains.chain_ids,
            noise=noise,
        )
        slots.level.copy_(slots.next_level)
        chains.step.add_(1)

    def _renoise(
        self, mask: Tensor, slots: SlotState, choice: PatchChoice | None, initial: bool, noise: GivenNoise | None
    ) -> None:
        """Replace the patches of the mask, or the chosen ones, by the noise that this regeneration starts from."""
        chains, sampling, active = self.chains, self.sampling, slots.active
        as_initial = initial or sampling.fixed_noise
        renoise(
            chains.patches,
            mask,
            Slots(active.index, active.count, slots.level, slots.start),
            seed=sampling.seed,
            stream=STREAM_INITIAL if as_initial else STREAM_RENOISE,
            iteration=torch.zeros_like(chains.iteration) if as_initial else chains.iteration,
            chain_ids=chains.chain_ids,
            choice=choice,
            noise=None if noise is None else noise.initial,
        )

    def _prepare(self, slots: SlotState) -> dict[str, Any]:
        """What the model computes once an iteration, as keyword arguments of its calls."""
        if not hasattr(self.model, "prepare"):
            return {}
        with span("prepare"):
            self._context = self.model.prepare(self.chains.patches, slots.active, out=self._context)
        return {"context": self._context}

    def _slot_state(self, slots: int) -> SlotState:
        if slots not in self._slots:
            patches = self.chains.patches
            self._slots[slots] = SlotState.allocate(len(patches), slots, patches.device)
        return self._slots[slots]
