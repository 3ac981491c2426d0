"""Cost of a tick outside the network, of ragged batches, and of running without graphs.

Every round starts from the same samples; the first is checked against the reference on a few chains. Graphs need a GPU.
There, torch's profiler also shows the kernels outside the network, and host waits during replays, which must be none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from support import device_trace, gate, subjects
from support.chains import Chains, Replayed
from support.harness import Clock, quartiles, sizes_of
from support.measure import Arm, Check, Measure
from support.records import Record
from torch import Tensor

from ipr_fast import random_patches, refine_batch
from ipr_fast.engine.precision import float32_products

pytestmark = pytest.mark.benchmark(group="step")
MOST_STEPS = {"4x4 transformer": 16, "9x9 transformer": 48, "Even Pixels": 3, "MNIST Sudoku": 5}
UNETS = "Even Pixels", "MNIST Sudoku"
GRAPHS = {"tick graphs": False, "iteration graphs": True}  # whole iterations captured?
TRACE_NEEDS = 20.0  # seconds that other benchmarks leave for the trace on a GPU
AIM = {"batch": 64, "outside_share": 0.03}  # target for a UNet's ticks on a GPU


class Case(NamedTuple):
    """`batch` chains of a model. needs: about how many seconds they take."""

    subject: str
    batch: int
    smoke: bool = False
    needs: float = 8.0

    def __str__(self) -> str:
        return f"{self.subject}, {self.batch}"

    def chains(self, device: torch.device, **options: object) -> Chains:
        """Return the chains, with the model's refinement schedule, shortened if its steps take long."""
        model = subjects.makers(self.smoke)[self.subject]().to(device)
        steps = 4 if self.smoke else MOST_STEPS[self.subject]
        schedule = subjects.shortened(model.refine_schedule, subjects.num_active(model), steps)
        return Chains(model, self.batch, schedule, device, **options)

    def facts(self, chains: Chains, variant: str) -> dict[str, object]:
        facts = {"subject": self.subject, "batch": self.batch, "dtype": "float32", "variant": variant}
        return facts | {"steps": chains.plan.steps}


def cases(sizes: str) -> list[Case]:
    transformer, unet = "4x4 transformer", "Even Pixels"
    if sizes == "smoke":
        return [Case(name, batch, smoke=True) for name in (transformer, unet) for batch in (1, 3)]
    if sizes == "small":
        return [*(Case(transformer, batch) for batch in (1, 64)), Case(unet, 1), Case(unet, 8, needs=20)]
    most = Case("MNIST Sudoku", 64, needs=15), Case(unet, 4096, needs=30)
    return [
        *(Case(name, batch) for name in (transformer, unet) for batch in (1, 64, 256)),
        Case(transformer, 4096),
        *most,
    ]


def ragged_cases(sizes: str) -> list[Case]:
    if sizes == "full":
        return [Case("9x9 transformer", 4096, needs=25)]
    return [Case("4x4 transformer", 6, smoke=True) if sizes == "smoke" else Case("4x4 transformer", 64)]


def traced_cases(sizes: str) -> list[Case]:
    smoke = sizes == "smoke"
    return [Case(name, 3 if smoke else 64, smoke) for name in ("4x4 transformer", "Even Pixels")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    of_test = {"test_ragged": ragged_cases, "test_replays": traced_cases}
    found = of_test.get(metafunc.function.__name__, cases)(sizes_of(metafunc.config))
    metafunc.parametrize("case", found, ids=str)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", GRAPHS)


def test_tick(case: Case, measure: Measure, device: torch.device) -> None:
    """Time ticks against their denoiser calls, both from the same state; replayed on a GPU, without the host."""
    may_take(case, measure)
    chains = case.chains(device, graphs=False)
    chains.iterate()
    steps = chains.plan.steps
    ticks, network = (
        Arm(partial(repeat, Replayed(name, function, device), steps), steps, chains.begin)
        for name, function in (("tick", chains.tick), ("network", chains.predict))
    )

    def check() -> Check:
        chains.begin()
        ticks.work()
        return against_the_reference(chains, chains.lanes.state.values)

    facts = case.facts(chains, "tick graphs" if device.type == "cuda" else "eager")
    if device.type == "cuda" and case.subject in UNETS and case.batch == AIM["batch"]:
        facts["targets"] = {"outside_share": AIM["outside_share"]}
    measure(check, ticks, {"network": network}, unit="ticks", needs=case.needs, derive=outside_share, **facts)


def test_ragged(case: Case, measure: Measure, device: torch.device) -> None:
    """Time chains with 0 clues to a third of the patches against chains without, per step that chains need."""
    may_take(case, measure)
    plain = case.chains(device)
    chains = case.chains(device, known=clues(case.batch, plain.model.grid.num_patches, device))
    ours, theirs = (Arm(each.iterate, each.plan.chain_steps, each.restart) for each in (chains, plain))
    facts = case.facts(chains, "ragged") | {"mean_active": chains.select.counts.double().mean().item()}
    measure(
        partial(check_iteration, chains), ours, {"without clues": theirs}, unit="chain-steps", needs=case.needs, **facts
    )


def test_graphs(case: Case, variant: str, measure: Measure, device: torch.device) -> None:
    """Time whole iterations, per tick, with graphs against without."""
    skip_without_gpu(device)
    may_take(case, measure)
    eager = case.chains(device, graphs=False)
    chains = case.chains(device, whole_iterations=GRAPHS[variant])
    steps = chains.plan.steps
    ours, theirs = (Arm(each.iterate, steps, each.restart) for each in (chains, eager))
    facts = case.facts(chains, variant)
    measure(partial(check_iteration, chains), ours, {"without graphs": theirs}, unit="ticks", needs=case.needs, **facts)


@pytest.fixture(scope="module")
def trace(device: torch.device, sizes: str, clock: Clock) -> list[dict]:
    """One recording of all cases, as some versions of CUPTI see nothing in a second one."""
    skip_without_gpu(device)
    if not clock.fits(TRACE_NEEDS):
        pytest.skip(f"{clock.left():.0f} s are left, and the trace needs about {TRACE_NEEDS:.0f}")
    works: dict[str, Callable[[], object]] = {}
    with float32_products(device, tf32=False):
        for case in traced_cases(sizes):
            eager, replayed = case.chains(device, graphs=False), case.chains(device)
            eager.iterate()
            replayed.iterate(2)
            works[f"begin of {case}"] = eager.begin
            works[f"ticks of {case}"] = partial(marked_ticks, eager)
            works[f"replays of {case}"] = partial(replayed.iterate, 3)
        return device_trace.record(works, device)


def test_replays(case: Case, measure: Measure, device: torch.device, trace: list[dict]) -> None:
    """Count host waits in three replayed iterations, and kernels of eager ticks outside the network.

    It comes last, as the profiler slows down later work.
    """
    waits = device_trace.waits(trace, f"replays of {case}")
    outside = device_trace.time_by_place(trace, f"ticks of {case}", "network")
    chains = case.chains(device)
    facts = case.facts(chains, "traced") | {"waits": waits["waits"], "waits_of": waits["of"], "targets": {"waits": 0}}
    facts |= {"outside_share": quartiles([outside["outside_share"]]), "outside_us": outside["outside_us"]}
    ours = Arm(chains.iterate, chains.plan.steps, chains.restart)
    measure(partial(check_iteration, chains), ours, unit="ticks", needs=case.needs, **facts)


def may_take(case: Case, measure: Measure) -> None:
    """Skip a case without enough time left for it and, on a GPU, for the trace."""
    measure.may_take(case.needs + (TRACE_NEEDS if measure.device.type == "cuda" else 0.0))


def skip_without_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("graphs need a CUDA device")


def check_iteration(chains: Chains) -> Check:
    chains.restart()
    chains.iterate()
    return against_the_reference(chains, chains.engine.values)


def against_the_reference(chains: Chains, patches: Tensor) -> Check:
    """Check patches (B, N, P) after the first iteration; a few chains, as none depends on its batch."""
    few = slice(gate.CHECKED)
    known = None if chains.known is None else chains.known[few]
    options = {"model": chains.model, "schedule": chains.schedule, "known": known, "backend": "reference"}
    expected = refine_batch(chains.x[few], random_patches(subjects.RATIO), 1, **options)
    assert (expected != chains.x[few]).any(), "nothing was refined"
    return gate.closeness(chains.model.grid.to_images(patches[few]), expected, "the reference")


def outside_share(record: Record) -> dict[str, object]:
    """Return the share of a tick outside the network, in quartiles over the rounds."""
    return {"outside_share": quartiles([1 - ratio for ratio in record.ratios("network")])}


def clues(batch: int, num_patches: int, device: torch.device) -> Tensor:
    """Return clues (batch, num_patches) bool, uniformly 0 to a third of the patches."""
    generator = torch.Generator(device).manual_seed(0)
    number = torch.randint(0, num_patches // 3, (batch, 1), generator=generator, device=device)
    return torch.rand(batch, num_patches, generator=generator, device=device).argsort(1).argsort(1) < number


def marked_ticks(chains: Chains) -> None:
    """Run an iteration's ticks, with denoiser calls in ranges named "network"."""
    with device_trace.marked(chains.model, "network"):
        repeat(chains.tick, chains.plan.steps)


def repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()
