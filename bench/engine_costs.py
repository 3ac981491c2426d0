"""What the engine costs beside the network: ticks on graphs and without, idle lanes, kernels of its own, waits."""

from __future__ import annotations

from collections.abc import Callable

import device_trace
import subjects
import torch
from harness import FEWEST_ROUNDS, Run, interleaved, peak, quartiles, reset_peak, say, seconds
from torch import Tensor

from ipr_fast import Denoiser, Schedule, random_patches
from ipr_fast.engine import Engine, Sampling
from ipr_fast.graphs import Capture, CudaCapture
from ipr_fast.lanes import Lanes, Start
from ipr_fast.precision import float32_products
from ipr_fast.selection import Selector
from ipr_fast.waves import FewSizes, make_plan

VARIANTS = {"eager": (False, False), "tick graphs": (True, False), "iteration graphs": (True, True)}


class Chains:
    """Chains in an engine of their own, to be iterated."""

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
        self.lanes = Lanes(
            model, batch, device, sampling.settings(), capture_on(device) if graphs else None, whole_iterations
        )
        ids = torch.arange(batch, device=device)
        free = torch.ones(batch, grid.num_patches, dtype=torch.bool, device=device) if known is None else ~known
        x = subjects.samples(model, batch, device)
        self.engine = Engine(model, grid.to_patches(x), ids, sampling, self.lanes)
        self.select = Selector(random_patches(subjects.RATIO), grid, free, ids, sampling.seed)
        self.plan = make_plan(self.select.counts, schedule, batch, FewSizes(batch))
        self.iteration = 0

    def iterate(self, times: int = 1) -> None:
        for _ in range(times):
            self.iteration += 1
            self.engine.begin(self.iteration)
            self.engine.regenerate(self.select(self.iteration, self.engine.iteration, lambda: None))

    def again(self) -> None:
        """Begin an iteration on the lanes, with the chains that are in them."""
        self.lanes.begin(self.lanes.lanes, self.slots, Start(chooses=True, initial=False))

    def ticks(self) -> None:
        for _ in range(self.plan.steps):
            self.lanes.tick(self.lanes.lanes, self.slots)

    @property
    def slots(self) -> int:
        return self.plan.waves[0].most_active


class Again:
    """In place of a capture, where there is no GPU: the work is simply done again."""

    def __call__(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def start_over(self) -> None:
        """Nothing is kept."""


def capture_on(device: torch.device) -> Capture:
    """CUDA graphs, on a GPU."""
    return CudaCapture(device) if device.type == "cuda" else Again()


def measure(run: Run) -> None:
    """Everything, as far as the time goes; into run.results."""
    models: dict[str, Denoiser] = {}

    def model(name: str) -> Denoiser:
        if name not in models:
            models[name] = subjects.makers(run.smoke)[name]().to(run.device)
        return models[name]

    small = [("4x4 transformer", 3), ("Even Pixels", 3)]
    real = [("4x4 transformer", 256), ("Even Pixels", 64), ("4x4 transformer", 1), ("Even Pixels", 1)]
    works: list[tuple[str, float, Callable[[], None]]] = [
        (f"ticks of {name}, {batch} chains", 8, lambda name=name, batch=batch: ticks(run, model(name), name, batch))
        for name, batch in (small if run.smoke else [*real, ("4x4 transformer", 4096)])
    ]
    boards = ("4x4 transformer", 6) if run.smoke else ("9x9 transformer", 4096)
    works.append((f"ragged chains of {boards[0]}", 25, lambda: ragged(run, model(boards[0]), *boards)))
    batch, unets = (3, ["Even Pixels"]) if run.smoke else (64, ["Even Pixels", "MNIST Sudoku"])
    works.append((f"network of {unets[0]}", 10, lambda: by_difference(run, model(unets[0]), unets[0], batch)))
    works.append(("profiler", 20, lambda: profiled(run, {name: model(name) for name in unets}, batch)))
    last, reserve = works[-1][:2]  # the profiler, which slows down what comes after it
    with float32_products(run.device, tf32=False):
        for name, needs, work in works:
            if run.clock.fits(0 if run.smoke else needs if name == last else needs + reserve):
                with run.attempt(name):
                    work()
            else:
                run.skip(name, "no time left")


def ticks(run: Run, model: Denoiser, name: str, batch: int) -> None:
    """An iteration without graphs, with a graph for a tick, and with one for the iteration."""
    schedule = subjects.shortened(model.refine_schedule, subjects.num_active(model), 4 if run.smoke else 16)
    row: dict = {"subject": name, "batch": batch, "variants": {}}
    chains, slowest = {}, 0.0
    for variant, how in VARIANTS.items():
        before = reset_peak(run.device)
        chains[variant] = Chains(model, batch, schedule, run.device, *how)
        first, again = (seconds(chains[variant].iterate, run.device) for _ in range(2))
        row["variants"][variant] = {"first": first, "capture": max(0.0, first - again), **peak(run.device, before)}
        slowest = max(slowest, again)
    row["steps"] = chains["eager"].plan.steps
    times = 1 if run.smoke else max(1, min(20, round(0.2 / slowest)))
    measured = interleaved(
        {variant: lambda each=each: each.iterate(times) for variant, each in chains.items()},
        run.device,
        FEWEST_ROUNDS if run.smoke else 9,
        run.clock.within(8),
    )
    for variant, each in measured.items():
        row["variants"][variant]["tick"] = [time / times / row["steps"] for time in quartiles(each)]
    eager, replayed = (measured[variant] for variant in ("eager", "tick graphs"))
    row["graphs_times_faster"] = quartiles([a / b for a, b in zip(eager, replayed, strict=True)])
    whole = measured["iteration graphs"]
    row["whole_times_faster"] = quartiles([a / b for a, b in zip(replayed, whole, strict=True)])
    run.results.setdefault("ticks", []).append(row)


def ragged(run: Run, model: Denoiser, name: str, batch: int) -> None:
    """Chains with 0 clues to a third of the patches, against chains without any."""
    num_patches, device = model.grid.num_patches, run.device
    most = num_patches // 3 - 1
    generator = torch.Generator(device).manual_seed(0)
    clues = torch.randint(0, most + 1, (batch, 1), generator=generator, device=device)
    order = torch.rand(batch, num_patches, generator=generator, device=device).argsort(1).argsort(1)
    schedule = model.refine_schedule
    chains, result = {}, {"subject": name, "batch": batch, "most_clues": most}
    for label, known in (("no clues", None), ("clues", order < clues)):
        before = reset_peak(device)
        chains[label] = Chains(model, batch, schedule, device, known=known)
        first, _ = (seconds(chains[label].iterate, device) for _ in range(2))
        plan, active = chains[label].plan, chains[label].select.counts.double().mean().item()
        result[label] = {"first": first, "chain_steps": plan.chain_steps, "idle_share": plan.idle_share}
        result[label] |= {"mean_active": active, "slots": chains[label].slots, **peak(device, before)}
    works = {label: each.iterate for label, each in chains.items()}
    measured = interleaved(works, device, FEWEST_ROUNDS, run.clock)
    for label, each in measured.items():
        result[label]["iteration"] = quartiles(each)
        result[label]["chain_step"] = [time / result[label]["chain_steps"] for time in quartiles(each)]
    run.results["ragged"] = result


@torch.inference_mode()
def by_difference(run: Run, model: Denoiser, name: str, batch: int) -> None:
    """The share of a tick outside the network, from graphs of the ticks and of the network alone."""
    chains = _ready(run, model, batch)
    lanes, capture = chains.lanes, capture_on(run.device)
    tick = capture("tick", lambda: lanes.tick(batch, chains.slots))
    begin = capture("begin", chains.again)
    network = capture("network", lambda: lanes.predict(batch, chains.slots))
    steps = range(chains.plan.steps)

    def all_ticks() -> None:
        begin()
        for _ in steps:
            tick()

    works = {"ticks": all_ticks, "begin": begin, "network": lambda: [network() for _ in steps]}
    measured = interleaved(works, run.device, FEWEST_ROUNDS if run.smoke else 7, run.clock.within(8))
    shares = [
        1 - c / (a - b) for a, b, c in zip(measured["ticks"], measured["begin"], measured["network"], strict=True)
    ]
    run.results["by_difference"] = {"subject": name, "batch": batch, "outside_share": quartiles(shares)}


@torch.inference_mode()
def profiled(run: Run, models: dict[str, Denoiser], batch: int) -> None:
    """The share of a tick outside the network, kernel by kernel, and the host's waits between replays."""
    chains = {name: _ready(run, model, batch) for name, model in models.items()}
    first = next(iter(models))
    schedule = subjects.shortened(models[first].refine_schedule, subjects.num_active(models[first]), 10)
    on_graphs = Chains(models[first], batch, schedule, run.device)
    on_graphs.iterate(2)
    works = {}
    for name, each in chains.items():
        works |= {f"begin of {name}": each.again, f"ticks of {name}": _marked_ticks(models[name], each)}
    events = device_trace.record(works | {"replays": lambda: on_graphs.iterate(3)}, run.device)
    run.results["trace_events"] = len(events)
    if run.device.type != "cuda":
        say("  no device work to look at on a CPU")
        return
    for name in chains:
        found = device_trace.time_by_place(events, f"ticks of {name}", "network")
        run.results.setdefault("outside", {})[name] = found | {"batch": batch}
    run.results["waits"] = device_trace.waits(events, "replays") | {"subject": first, "batch": batch, "iterations": 3}


def _ready(run: Run, model: Denoiser, batch: int) -> Chains:
    """Chains without graphs that have run once, so that what they need is there."""
    steps = 4 if run.smoke else 5
    schedule = subjects.shortened(model.refine_schedule, subjects.num_active(model), steps)
    chains = Chains(model, batch, schedule, run.device, graphs=False)
    chains.iterate()
    return chains


def _marked_ticks(model: Denoiser, chains: Chains) -> Callable[[], None]:
    def work() -> None:
        with device_trace.marked(model, "network"):
            chains.ticks()

    return work
