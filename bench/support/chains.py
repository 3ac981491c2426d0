"""Chains whose iterations and ticks can be called one by one, and captured on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ipr_fast import Denoiser, Schedule, random_patches
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graphs import Capture, CudaCapture
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import Plan, make_plan
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import make_selector
from support import subjects
from support.launches import launches_to


class Step:
    """The parts of an iteration on lanes that all have `slots` active patches: `begin`, then `tick` by `tick`."""

    def __init__(self, lanes: PatchLanes, slots: int) -> None:
        self.lanes, self.slots = lanes, slots

    @classmethod
    @torch.inference_mode()
    def begun(
        cls,
        model: Denoiser,
        chains: int,
        slots: int,
        schedule: Schedule,
        device: torch.device | str,
        kernels: bool = False,
    ) -> Step:
        """A step without an engine, on any device, "meta" too; it has begun once, so all buffers are allocated.

        kernels: weights are laid out as on a GPU, for counts of kernels.
        """
        with launches_to(lambda *_: None) if kernels else nullcontext():
            lanes = PatchLanes(model, chains, torch.device(device), PatchSettings(0.5, 1.0))
            lanes.set_sampling(0, schedule)
            lanes.state.free.fill_(True)
            lanes.state.size.fill_(slots)
            step = cls(lanes, slots)
            step.begin()
        return step

    @torch.inference_mode()
    def begin(self) -> None:
        """Choose patches, renoise them, prepare the model."""
        self.lanes.begin(self.lanes.num_lanes, self.slots, chooses=True, initial=False)

    @torch.inference_mode()
    def tick(self) -> None:
        """One denoiser call and one update."""
        self.lanes.tick(self.lanes.num_lanes, self.slots)

    @torch.inference_mode()
    def predict(self) -> None:
        """The denoiser call of a tick."""
        self.lanes.predict(self.lanes.num_lanes, self.slots)


class Chains(Step):
    """`batch` chains of a model with samples x (B, C, H, W) and an engine; known (B, N) bool: patches that stay.

    graphs: capture ticks as CUDA graphs, on a GPU; whole_iterations: capture iterations instead.
    """

    def __init__(
        self,
        model: Denoiser,
        batch: int,
        schedule: Schedule,
        device: torch.device,
        graphs: bool = True,
        whole_iterations: bool = False,
        known: Tensor | None = None,
    ) -> None:
        grid, sampling = model.grid, Sampling(schedule)
        self.model, self.schedule, self.known = model, schedule, known
        capture = capture_on(device) if graphs else None
        lanes = PatchLanes(model, batch, device, PatchSettings.of(sampling))
        ids = torch.arange(batch, device=device)
        free = torch.ones(batch, grid.num_patches, dtype=torch.bool, device=device) if known is None else ~known
        self.x = subjects.samples(model, batch, device)
        self.engine = Engine(Runner(lanes, capture, whole_iterations), grid.to_patches(self.x), ids, sampling)
        self.select = make_selector(random_patches(subjects.RATIO), grid, free, ids, sampling.seed)
        super().__init__(lanes, self.select.most_active)
        self.iteration = 0

    def restart(self) -> None:
        """Go back to the samples, before the first iteration."""
        self.engine.values.copy_(self.model.grid.to_patches(self.x))
        self.iteration = 0

    def iterate(self, times: int = 1) -> None:
        """Run iterations as `refine_batch` does."""
        for _ in range(times):
            self.iteration += 1
            self.engine.begin(self.iteration)
            self.engine.regenerate(self.select(self.iteration, self.engine.iteration, lambda: None))

    @torch.inference_mode()
    def begin(self) -> None:
        """Begin the first iteration on the lanes themselves, which must have run an iteration before.

        For chains without known patches: they are in the lanes in their own order.
        """
        state = self.lanes.state
        state.values.copy_(self.model.grid.to_patches(self.x))
        state.iteration.fill_(1)
        state.choice_iteration.fill_(1)
        super().begin()

    @property
    def plan(self) -> Plan:
        """The waves of one iteration: which chains take which steps."""
        return make_plan(self.select.counts, self.schedule.steps, self.lanes.num_lanes, self.engine.runner.lanes_for)


class EagerCapture:
    """Stands in for a capture without a GPU: a replay runs the function again."""

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def start_over(self) -> None:
        """Nothing is kept."""


def capture_on(device: torch.device) -> Capture:
    """Return a capture of CUDA graphs on a GPU, else `EagerCapture`."""
    return CudaCapture(device) if device.type == "cuda" else EagerCapture()


class Replayed:
    """A function that the first call captures, on a GPU; its results must stay in buffers."""

    def __init__(self, name: str, function: Callable[[], None], device: torch.device) -> None:
        self.name, self.function, self.device = name, function, device
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None:
            self.replay = capture_on(self.device)(self.name, self.function)
        self.replay()
