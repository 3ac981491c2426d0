"""Chains in lanes of their own, whose iterations and ticks can be called one by one, and captured on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ipr_fast import Denoiser, Schedule, random_patches
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graphs import Capture, CudaCapture
from ipr_fast.engine.lanes import Lanes, Settings, Start
from ipr_fast.engine.scheduler import Plan, make_plan
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selector
from support import subjects


class Chains:
    """`batch` chains of a model, from samples x (B, C, H, W); known (B, N) bool are those patches that stay.

    graphs: capture ticks, where there is a GPU; whole_iterations: iterations in place of ticks.
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
        self.lanes = Lanes(model, batch, device, Settings.of(sampling), capture, whole_iterations)
        ids = torch.arange(batch, device=device)
        free = torch.ones(batch, grid.num_patches, dtype=torch.bool, device=device) if known is None else ~known
        self.x = subjects.samples(model, batch, device)
        self.engine = Engine(model, grid.to_patches(self.x), ids, sampling, self.lanes)
        self.select = Selector(random_patches(subjects.RATIO), grid, free, ids, sampling.seed)
        self.slots = self.select.most_active
        self.iteration = 0

    def restart(self) -> None:
        """Back to the samples and to before the first iteration."""
        self.engine.patches.copy_(self.model.grid.to_patches(self.x))
        self.iteration = 0

    def iterate(self, times: int = 1) -> None:
        """Iterations as `refine_batch` runs them."""
        for _ in range(times):
            self.iteration += 1
            self.engine.begin(self.iteration)
            self.engine.regenerate(self.select(self.iteration, self.engine.iteration, lambda: None))

    @torch.inference_mode()
    def begin(self) -> None:
        """The first iteration up to its first tick, on the lanes themselves, which have been through an iteration.

        For chains without known patches: they stand in the lanes in their own order.
        """
        state = self.lanes.state
        state.patches.copy_(self.model.grid.to_patches(self.x))
        state.iteration.fill_(1)
        state.choice_iteration.fill_(1)
        self.lanes.begin(self.lanes.lanes, self.slots, Start(chooses=True, initial=False))

    @torch.inference_mode()
    def tick(self) -> None:
        self.lanes.tick(self.lanes.lanes, self.slots)

    @torch.inference_mode()
    def predict(self) -> None:
        """The network's part of a tick."""
        self.lanes.predict(self.lanes.lanes, self.slots)

    @property
    def plan(self) -> Plan:
        """Which chains take which steps, in one iteration."""
        return make_plan(self.select.counts, self.schedule, self.lanes.lanes, self.lanes.lanes_for)


class Again:
    """In place of a capture, where there is no GPU: the work is simply done again."""

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def start_over(self) -> None:
        """Nothing is kept."""


def capture_on(device: torch.device) -> Capture:
    """CUDA graphs, on a GPU."""
    return CudaCapture(device) if device.type == "cuda" else Again()


class Replayed:
    """A function that the first call captures, where there is a GPU; it leaves nothing but what is in buffers."""

    def __init__(self, name: str, function: Callable[[], None], device: torch.device) -> None:
        self.name, self.function, self.device = name, function, device
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None:
            self.replay = capture_on(self.device)(self.name, self.function)
        self.replay()
