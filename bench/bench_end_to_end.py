"""Rate and memory of refine_batch, against batch size, iterations, alpha and model.

The rate is chain-iterations per second, of iterations with `steps` steps: long schedules are shortened. Memory is the
peak of tensor bytes beside model and samples in a first call, counted by ipr_fast.engine.memory on a CPU, by the
allocator on a GPU. The result of that call is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support import gate, subjects
from support.harness import Clock, most_bytes, sizes_of
from support.measure import Arm, Check, Measure
from support.subjects import RATIO
from torch import Tensor

import ipr_fast

pytestmark = [pytest.mark.benchmark(group="end to end"), pytest.mark.usefixtures("keep_lanes")]
WHOLE = 1000  # most_steps for the model's own schedule


class Point(NamedTuple):
    """One point of a sweep. most_steps: of an iteration. needs: about how many seconds it takes."""

    sweep: str
    subject: str
    batch: int
    iters: int = 1
    ratio: float = RATIO
    most_steps: int = WHOLE
    needs: float = 5.0

    def __str__(self) -> str:
        value = "" if self.sweep == "model" else f"={getattr(self, self.sweep)}"
        return f"{self.subject}, {self.sweep}{value}"


def points(sizes: str) -> Iterator[Point]:
    """Yield all sweeps, the largest batches last."""
    transformer, unet = "4x4 transformer", "Even Pixels"
    if sizes == "smoke":
        yield from (Point("batch", name, batch, most_steps=4) for name in (transformer, unet) for batch in (1, 5))
        yield from sweeps(transformer, 3)
        yield from (Point("model", name, 1, most_steps=1) for name in subjects.makers(smoke=True))
    elif sizes == "small":
        # One core takes 1.3 s for a step of Counting Polygons, and 5 s for one of MNIST Sudoku.
        slow = {"Counting Polygons": 15.0, "MNIST Sudoku": 60.0}
        models = subjects.makers(smoke=False)
        yield from (Point("model", name, 1, most_steps=1, needs=slow.get(name, 5.0)) for name in models)
        yield from sweeps(transformer, 16)
        yield from (Point("batch", unet, batch, most_steps=5, needs=5 + 2 * batch) for batch in (1, 4, 16))
        # Many iterations for few chains, so that the cost of a call is small, as in a refinement of fifty.
        iters = {1: 20, 4: 20, 16: 10, 64: 8, 256: 4, 1024: 2, 4096: 1}
        yield from (Point("batch", transformer, b, n, most_steps=4, needs=5 + b / 100) for b, n in iters.items())
    else:
        models = subjects.makers(smoke=False)
        yield from (
            Point("model", name, 16, most_steps=10, needs=25 if name == "MNIST Sudoku" else 10) for name in models
        )
        yield from sweeps(transformer, 4096)
        batches = (1, 4, 16, 64, 256, 1024, 4096)
        yield from (Point("batch", transformer, batch, iters=10, most_steps=16) for batch in batches)
        yield from (Point("batch", unet, batch, most_steps=5, needs=5 + batch / 100) for batch in batches)


def sweeps(subject: str, batch: int) -> Iterator[Point]:
    """Yield sweeps of iterations, shortened, and of alpha, with the model's own schedule."""
    yield from (Point("iters", subject, batch, iters=iters, most_steps=5) for iters in (1, 2, 5, 10))
    yield from (Point("ratio", subject, batch, ratio=ratio) for ratio in (0.1, 0.25, 0.5, 1.0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("point", list(points(sizes_of(metafunc.config))), ids=str)


@pytest.fixture(scope="module")
def clock(clock: Clock) -> Clock:
    """Half of the time, to leave some for later benchmarks."""
    return clock.share(0.5)


def test_refine_batch(point: Point, measure: Measure, device: torch.device, sizes: str) -> None:
    measure.may_take(point.needs)
    model = subjects.makers(sizes == "smoke")[point.subject]().to(device)
    active = subjects.num_active(model, point.ratio)
    schedule = subjects.shortened(model.refine_schedule, active, point.most_steps)
    x, policy = subjects.samples(model, point.batch, device), ipr_fast.random_patches(point.ratio)

    def refine(iters: int = point.iters, chains: int = point.batch, backend: str = "auto") -> Tensor:
        return ipr_fast.refine_batch(x[:chains], policy, iters, model=model, schedule=schedule, backend=backend)

    def check() -> Check:
        size, refined = most_bytes(refine, device)
        measure.benchmark.extra_info["peak_bytes"] = size
        if point.sweep == "iters":
            once, _ = most_bytes(lambda: refine(iters=1), device)
            assert size == once, f"{point.iters} iterations take {size} bytes, one takes {once}"
        # A chain does not depend on its batch, so the reference refines the first ones only.
        expected = refine(chains=gate.CHECKED, backend="reference")
        assert (expected != x[: gate.CHECKED]).any(), "nothing was refined"
        return gate.closeness(refined[: gate.CHECKED], expected, "the reference")

    measure(
        check,
        Arm(refine, point.batch * point.iters),
        unit="chain-iterations",
        needs=point.needs,
        budget=0.0 if sizes == "smoke" else 1.5,
        sweep=point.sweep,
        subject=point.subject,
        batch=point.batch,
        iters=point.iters,
        ratio=point.ratio,
        dtype="float32",
        steps=schedule.steps(active),
        own_steps=model.refine_schedule.steps(active),
    )
