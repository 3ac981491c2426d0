"""Chain-iterations a second: refine_batch against the loops of bench/loops.py, interleaved, in one run.

All arms of a case run the same shortened schedule, so that an iteration takes a few steps; "of its own schedule" scales
by the steps. What `refine_batch` does once an iteration weighs more in a short one, and what it does once a call more
in a call of few iterations: both count against it. `one at a time` runs a single chain: its rate does not depend on
the batch. A ratio is the median over the rounds, with quartiles.

float32 is without TF32 in all arms. In bfloat16 a transformer's weights are bfloat16; the baseline's UNet runs under
autocast, as its formula computes embeddings of levels in float32.

Before a model is timed, the loops have to give the numbers of refine_batch from its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import loops
import subjects
import torch
from gate import compiled_difference, gate
from harness import (
    FEWEST_ROUNDS,
    Run,
    describe_error,
    free_memory,
    interleaved,
    peak,
    quartiles,
    reset_peak,
    say,
    seconds,
)
from subjects import BASELINES, RATIO, Case
from torch import Tensor

import ipr_fast
from ipr_fast import Denoiser, Schedule, reuse
from ipr_fast.models import PatchTransformer
from ipr_fast.precision import float32_products

CASE_SECONDS = 30.0  # that one arm of a case may take; and rounds beyond the fewest, all arms together
ROUND_SECONDS = 0.3  # that one arm of a round should take
MOST_ITERS = 50
COMPILE_SECONDS = 45.0  # that torch.compile is expected to take for a model that it has not seen


class Arm(NamedTuple):
    """work(iters) refines `chains` chains; what `check` finds is kept, and what it raises bars the arm."""

    work: Callable[[int], object]
    chains: int
    check: Callable[[], dict] = dict


class Bench:
    """The models, made when they are needed, and what their iterations took: what the next case will take."""

    def __init__(self, run: Run) -> None:
        self.run, self.make = run, subjects.makers(run.smoke)
        self.rounds, self.round_seconds = (FEWEST_ROUNDS, 0.0) if run.smoke else (5, ROUND_SECONDS)
        self.compiling: dict[str, float] = {}  # seconds, by the model's name
        self.compile_failed = False
        self._models: dict[tuple[str, torch.dtype], tuple[Denoiser, loops.Network]] = {}
        self._took: dict[tuple, dict[int, float]] = {}  # seconds a step, by the number of chains

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[Denoiser, loops.Network]:
        """A model and its baseline network, on the device."""
        if (name, dtype) not in self._models:
            model = self.make[name]().to(self.run.device)
            network = loops.baseline_network(model)
            if dtype != torch.float32:
                model = model.to(dtype)
                # Autocast keeps the weights it has cast only where they require a gradient.
                network = network.to(dtype) if isinstance(model, PatchTransformer) else network.requires_grad_(True)
            self._models[name, dtype] = model, network
        return self._models[name, dtype]

    def schedule(self, case: Case) -> tuple[Schedule, int]:
        """The shortened schedule of a case, and the steps of an iteration."""
        model, _ = self.model(case.subject, case.dtype)
        active = subjects.num_active(model)
        schedule = subjects.shortened(model.refine_schedule, active, case.most_steps)
        return schedule, schedule.steps(active)

    def expected(self, case: Case, arm: str) -> float:
        """The seconds of an iteration, at the most, by what it took with other numbers of chains; 0 if nobody knows."""
        took = self._took.get((case.subject, case.dtype, arm))
        if not took:
            return 0.0
        nearest = max((batch for batch in took if batch <= case.batch), default=min(took))
        more = 1.0 if arm == "one at a time" else max(1.0, case.batch / nearest)
        return took[nearest] * self.schedule(case)[1] * more

    def remember(self, case: Case, arm: str, took: float) -> None:
        """What an iteration took."""
        self._took.setdefault((case.subject, case.dtype, arm), {})[case.batch] = took / self.schedule(case)[1]


def measure(run: Run) -> None:
    """All cases, as far as the time goes; into run.results."""
    bench = Bench(run)
    reuse.KEPT_SHARE = 1.0  # the calls here have few iterations, and stand for long ones: none is to capture again
    rows, gates = run.results.setdefault("cases", []), run.results.setdefault("gates", {})
    with float32_products(run.device, tf32=False):
        for case in subjects.cases(run.smoke, run.device.type == "cuda"):
            name = f"{case.subject}, {case.batch} chains, {str(case.dtype).removeprefix('torch.')}"
            if not run.clock.fits(0 if run.smoke else 8):
                run.skip(f"{name}, {' and '.join(case.arms)}", "no time left")
                continue
            if case.subject not in gates:
                gates[case.subject] = {"passed": False}
                with run.attempt(f"the loops against refine_batch, {case.subject}"):
                    gates[case.subject] = gate(*bench.model(case.subject), run.device)
            with run.attempt(name):
                measure_case(case, bench, rows)
            reuse.drop_kept()
    run.results["passed"] = bool(gates) and all(each["passed"] for each in gates.values())


def arms_of(case: Case, model: Denoiser, network: loops.Network, x: Tensor, sampling: loops.Sampling) -> dict[str, Arm]:
    device, policy = x.device, ipr_fast.random_patches(RATIO)
    autocast = case.dtype != torch.float32 and not isinstance(model, PatchTransformer)

    def batched(network: loops.Network, iters: int) -> None:
        with torch.autocast(device.type, case.dtype) if autocast else nullcontext():
            loops.batched(network, x, iters, sampling, loops.TorchNoise(device))

    single, on_cpu = x[:1].cpu(), loops.TorchNoise(torch.device("cpu"))
    arms = {
        "ours": Arm(lambda n: ipr_fast.refine_batch(x, policy, n, model=model, schedule=sampling.schedule), case.batch),
        "one at a time": Arm(lambda n: loops.one_at_a_time(network, single, n, sampling, on_cpu, device), 1),
        "batched": Arm(partial(batched, network), case.batch),
    }
    if "compiled" in case.arms:
        torch.compiler.reset()  # of the earlier cases' shapes: beyond a few, it would fall back to eager
        fast = loops.compiled(network)
        arms["compiled"] = Arm(partial(batched, fast), case.batch, lambda: compiled_difference(fast, network, x))
    # What the engine takes depends on the memory that is left, so it comes last.
    return {name: arms[name] for name in (*BASELINES, "ours") if name in case.arms}


def measure_case(case: Case, bench: Bench, rows: list[dict]) -> None:
    """Add the row of a case."""
    run, (model, network) = bench.run, bench.model(case.subject, case.dtype)
    schedule, steps = bench.schedule(case)
    row: dict = {
        "subject": case.subject,
        "batch": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "schedule": [schedule.steps_per_patch, schedule.overlap],
        "steps": steps,
        "own_steps": model.refine_schedule.steps(subjects.num_active(model)),
        "arms": {},
    }
    rows.append(row)
    if all(_too_long(case, bench, arm) for arm in case.arms):
        row["arms"] = {arm: {"skipped": _too_long(case, bench, arm)} for arm in case.arms}
        run.skip(f"{case.subject}, {case.batch} chains", row["arms"]["ours"]["skipped"])
        return
    x = subjects.samples(model, case.batch, run.device)
    arms = arms_of(case, model, network, x, loops.Sampling(schedule, RATIO))
    iters = {}
    for name, arm in arms.items():
        row["arms"][name] = warm_up(case, bench, name, arm)
        iters[name] = row["arms"][name].get("iters")
    ready = {name: partial(arms[name].work, n) for name, n in iters.items() if n}
    times = interleaved(ready, run.device, bench.rounds, run.clock.within(CASE_SECONDS))
    scale = row["steps"] / row["own_steps"]
    rates = {}
    for name, each in times.items():
        rates[name] = [arms[name].chains * iters[name] / time for time in each]
        rate = quartiles(rates[name])
        row["arms"][name] |= {"seconds": each, "rate": rate, "rate_of_its_own_schedule": [scale * r for r in rate]}
    baselines = [name for name in BASELINES if name in rates and "ours" in rates]
    row["faster"] = {
        name: quartiles([a / b for a, b in zip(rates["ours"], rates[name], strict=True)]) for name in baselines
    }
    say("  " + ", ".join(f"{name} {median[1]:.1f} times" for name, median in row["faster"].items()))


def warm_up(case: Case, bench: Bench, name: str, arm: Arm) -> dict:
    """The first call of an arm, and how many iterations a round is to take; or why there are none."""
    run, result = bench.run, {}
    reason = _too_long(case, bench, name)
    if reason:
        run.skip(f"{case.subject}, {case.batch} chains, {name}", reason)
        return {"skipped": reason}
    free_memory(run.device)
    before = reset_peak(run.device)
    try:
        result["first_call"] = seconds(lambda: arm.work(1), run.device)
        took = seconds(lambda: arm.work(1), run.device)
        result |= arm.check()
    except Exception as error:
        why = describe_error(error)
        if "out of memory" in why["message"].lower() or "not even one fits" in why["message"]:
            result["does_not_fit"] = why["message"]
        else:
            result["failed"] = why
            bench.compile_failed |= name == "compiled"
            run.results.setdefault("failed", {})[f"{case.subject}, {case.batch} chains, {name}"] = why
        say(f"  {name}: {why['message']}")
        return result
    bench.remember(case, name, took)
    if name == "compiled":
        bench.compiling[case.subject] = 1.2 * result["first_call"]
    result |= peak(run.device, before)
    result["iters"] = max(1, min(MOST_ITERS, round(bench.round_seconds / took)))
    if took * FEWEST_ROUNDS > min(CASE_SECONDS, run.clock.left()):
        result["skipped"] = f"an iteration takes {took:.1f} s: too long for {FEWEST_ROUNDS} rounds"
        result["single"] = took
        del result["iters"]
        run.skip(f"{case.subject}, {case.batch} chains, {name}", result["skipped"])
    return result


def _too_long(case: Case, bench: Bench, arm: str) -> str:
    """Why an arm cannot be measured in the time left, or nothing."""
    if bench.run.smoke:
        return ""
    clock = bench.run.clock
    if arm == "compiled" and bench.compile_failed:
        return "torch.compile has failed before"
    compiling = bench.compiling.get(case.subject, COMPILE_SECONDS) if arm == "compiled" else 0.0
    rounds = (2 + FEWEST_ROUNDS) * bench.expected(case, arm)
    if rounds > CASE_SECONDS or not clock.fits(compiling + rounds + 2):
        return f"would take about {compiling + rounds:.0f} s of the {clock.left():.0f} s left"
    return ""
