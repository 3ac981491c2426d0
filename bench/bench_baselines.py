"""refine_batch against the plain loops of baselines/loops.py, and SRMUNet against its published formula.

All arms of a comparison run the same weights and steps, with the same threads. Rates are chain-iterations per second,
so an arm may run fewer: `one at a time` takes two chains, as its rate does not depend on their number. Schedules are
shortened to a few steps; the cost of beginning an iteration then weighs more than usual, against refine_batch.

float32 is without TF32 in all arms. In bfloat16 a transformer's weights are bfloat16; the baseline's UNet runs under
autocast, as its formula embeds levels in float32.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import pytest
import torch
from baselines import loops
from baselines.per_pixel import PerPixelUNet
from support import gate, subjects
from support.harness import Clock, sizes_of
from support.measure import Arm, Check, Measure
from support.subjects import RATIO, Case
from torch import Tensor

import ipr_fast
from ipr_fast import ActivePatches, Denoiser, Prediction
from ipr_fast.models import PatchTransformer

pytestmark = [pytest.mark.benchmark(group="baselines"), pytest.mark.usefixtures("keep_lanes")]
ALONE = 2  # chains of the loop that takes one at a time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = sizes_of(metafunc.config)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", subjects.cases(sizes), ids=str)
    else:
        metafunc.parametrize("batch", (1, 3) if sizes == "smoke" else (1, 8) if sizes == "small" else (1, 8, 256))
        metafunc.parametrize("call", ("all patches", "a quarter active"))


@pytest.fixture(scope="module")
def clock(clock: Clock) -> Clock:
    """Half of the time, to leave some for later benchmarks."""
    return clock.share(0.5)


class Comparison:
    """A model and its baselines, on a device, in the precision of a case."""

    def __init__(self, case: Case, model: Denoiser, device: torch.device) -> None:
        self.case, self.device = case, device
        self.exact = model.to(device)
        self.network, self.model = loops.baseline_network(self.exact), self.exact
        self.autocasts = False
        if case.dtype != torch.float32:
            self.model = copy.deepcopy(self.exact).to(case.dtype)
            self.autocasts = not isinstance(model, PatchTransformer)
            # Autocast keeps the weights it has cast only where they require a gradient.
            self.network = self.network.requires_grad_(True) if self.autocasts else self.network.to(case.dtype)
        self.active = subjects.num_active(model)
        self.sampling = loops.Sampling(subjects.shortened(model.refine_schedule, self.active, case.most_steps), RATIO)
        self.x = subjects.samples(model, case.batch, device)

    @cached_property
    def compiled(self) -> loops.Network:
        torch.compiler.reset()  # after a few shapes of earlier cases it would fall back to eager
        return loops.compiled(self.network)

    def ours(self) -> Tensor:
        policy, schedule = ipr_fast.random_patches(RATIO), self.sampling.schedule
        return ipr_fast.refine_batch(self.x, policy, self.case.iters, model=self.model, schedule=schedule)

    def arms(self) -> dict[str, Arm]:
        """The case's loops, one iteration each."""
        alone, on_cpu = subjects.samples(self.model, ALONE, self.device).cpu(), loops.TorchNoise(torch.device("cpu"))
        one_at_a_time = partial(loops.one_at_a_time, self.network, alone, 1, self.sampling, on_cpu, self.device)
        found = {
            "one at a time": lambda: Arm(one_at_a_time, ALONE),
            "batched": lambda: Arm(partial(self.batched, self.network), self.case.batch),
            "compiled": lambda: Arm(partial(self.batched, self.compiled), self.case.batch),
        }
        return {name: found[name]() for name in self.case.against}

    def batched(self, network: loops.Network) -> Tensor:
        with self.autocast():
            return loops.batched(network, self.x, 1, self.sampling, loops.TorchNoise(self.device))

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.case.dtype) if self.autocasts else nullcontext()

    def check(self) -> Check:
        if self.case.dtype != torch.float32:
            with self.autocast():
                return gate.lower_precision(self.model, self.network, self.exact)
        found = gate.loops_and_engine(self.model, self.network, self.sampling, self.device)
        found.hold()
        return gate.compiled(self.compiled, self.network, self.x) if "compiled" in self.case.against else found


def test_loops(case: Case, measure: Measure, device: torch.device, sizes: str) -> None:
    """Chain-iterations per second of refine_batch and of the loops."""
    measure.may_take(case.needs)
    if "compiled" in case.against:
        need_compiler(device)
    with fitting():
        pair = Comparison(case, subjects.makers(sizes == "smoke")[case.subject](), device)
        measure(
            pair.check,
            Arm(pair.ours, case.batch * case.iters),
            pair.arms(),
            unit="chain-iterations",
            needs=case.needs,
            budget=0.0 if sizes == "smoke" else 3.0,
            subject=case.subject,
            batch=case.batch,
            dtype=str(case.dtype).removeprefix("torch."),
            iters=case.iters,
            ratio=RATIO,
            steps=pair.sampling.schedule.steps(pair.active),
            own_steps=pair.model.refine_schedule.steps(pair.active),
            targets=dict(case.targets),
        )


@torch.inference_mode()
def test_network(batch: int, call: str, measure: Measure, device: torch.device, sizes: str) -> None:
    """Samples per second through one call of SRMUNet, against the formula that embeds the level of every pixel.

    Levels are those of a schedule with thirty steps per patch, tabulated as in the engine. "All patches" gives every
    patch a level; "a quarter active" is a call of refinement, with the other patches clean.
    """
    model = subjects.makers(sizes == "smoke")["Even Pixels"]().to(device)
    per_pixel: PerPixelUNet = loops.baseline_network(model).inner
    patches = model.grid.to_patches(subjects.samples(model, batch, device))
    levels, active = (30 * gate.uniform(patches)).ceil() / 30, None
    if call == "a quarter active":
        number = subjects.num_active(model)
        active = ActivePatches.from_mask(gate.uniform(patches, seed=1).argsort(1) < number, number)
        levels = active.gather(levels)

    table = model.tabulate(torch.arange(31, device=device) / 30)

    def ours() -> Prediction:
        return model(patches, levels, active, table=table)

    def theirs() -> Prediction:
        return per_pixel(patches, levels, active)

    measure(
        lambda: gate.predictions(ours(), theirs(), "the published formula"),
        Arm(ours, batch),
        {"per pixel": Arm(theirs, batch)},
        unit="samples",
        budget=0.0 if sizes == "smoke" else 3.0,
        subject="Even Pixels",
        batch=batch,
        dtype="float32",
        call=call,
    )


@contextmanager
def fitting() -> Iterator[None]:
    """Skip work that does not fit into memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit into the memory: {str(error).splitlines()[0]}")


def need_compiler(device: torch.device) -> None:
    """Skip the benchmark if torch.compile cannot compile C++, which it needs on a CPU."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        pytest.skip(f"torch.compile needs a C++ compiler, and there is no {name}")
    if device.type == "cpu" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("torch.compile needs Python.h: install Python's development files")
