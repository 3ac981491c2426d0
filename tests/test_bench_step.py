"""What bench/bench_step.py measures: chains, their checks, and clues."""

from types import SimpleNamespace

import bench_step
import chains as chains_module
import device_trace
import pytest
import subjects
import torch
from chains import Chains, Replayed
from harness import quartiles
from records import Record
from small_models import TINY, randomise
from tape import Tape

from ipr_fast import Schedule
from ipr_fast.models import PatchTransformer

CPU = torch.device("cpu")
SCHEDULE = Schedule(3, 0.5)


@pytest.fixture(scope="module", params=["transformer", "unet"])
def denoiser(request):
    if request.param == "transformer":
        return randomise(PatchTransformer(TINY), seed=0)
    return subjects.random_unet(subjects.TINY_UNET)


@pytest.mark.parametrize("graphs", [False, True])
def test_iterations_ticks_and_the_reference_agree(denoiser, graphs):
    chains = Chains(denoiser, 6, SCHEDULE, CPU, graphs)
    bench_step.check_iteration(chains).hold()
    before = chains.engine.patches.clone()
    for _ in range(2):  # a round leaves nothing behind for the next
        chains.begin()
        bench_step.repeat(chains.tick, chains.plan.steps)
        assert torch.equal(chains.lanes.state.patches, before)
        bench_step.against_the_reference(chains, chains.lanes.state.patches).hold()
    chains.iterate()
    assert not torch.equal(chains.engine.patches, before)
    bench_step.check_iteration(chains).hold()


def test_chains_with_clues_are_checked_with_their_clues(model):
    known = bench_step.clues(30, 16, CPU)
    assert known.sum(1).min() == 0
    assert known.sum(1).max() == 4  # less than a third
    chains = Chains(model, 30, SCHEDULE, CPU, known=known)
    bench_step.check_iteration(chains).hold()
    without = Chains(model, 30, SCHEDULE, CPU)
    assert chains.plan.chain_steps < without.plan.chain_steps == 30 * without.plan.steps
    chains.known = torch.zeros_like(known)
    chains.known[:, ::2] = True
    with pytest.raises(AssertionError, match="reference"):
        bench_step.check_iteration(chains).hold()


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_wrong_result_is_noticed(model, value):
    chains = Chains(model, 5, SCHEDULE, CPU)
    chains.iterate()
    chains.engine.patches[1:3, 3] += value
    with pytest.raises(AssertionError, match="against='the reference'"):
        bench_step.against_the_reference(chains, chains.engine.patches).hold()


def test_a_tick_and_the_network_can_be_captured(denoiser, monkeypatch):
    """On a tape in a graph's place; the first call captures, and the next give what ticks give."""
    tapes = []
    monkeypatch.setattr(chains_module, "capture_on", lambda device: tapes.append(Tape()) or tapes[-1])
    chains = Chains(denoiser, 4, SCHEDULE, CPU, graphs=False)
    chains.iterate()
    tick, network = Replayed("tick", chains.tick, CPU), Replayed("network", chains.predict, CPU)
    for _ in range(2):
        network()
        chains.begin()
        bench_step.repeat(tick, chains.plan.steps)
    assert [tape.captured for tape in tapes] == [["network"], ["tick"]]
    bench_step.against_the_reference(chains, chains.lanes.state.patches).hold()


def test_the_share_outside_is_by_the_round():
    facts = {"units": 4, "against": {"network": {"units": 4, "seconds": [0.5, 0.9, 0.8]}}}
    record = Record("tick", "step", [1.0, 1.0, 1.0], facts)
    benchmark = SimpleNamespace(disabled=False, extra_info={})
    bench_step.add_outside_share(SimpleNamespace(benchmark=benchmark, records=[record]))
    assert benchmark.extra_info["outside_share"] == pytest.approx(quartiles([0.5, 0.1, 0.2]))
    assert record.facts["outside_share"] == benchmark.extra_info["outside_share"]
    bench_step.add_outside_share(SimpleNamespace(benchmark=SimpleNamespace(disabled=True)))


@pytest.mark.parametrize("sizes", ["smoke", "small", "full"])
def test_cases_name_models_and_steps(sizes):
    for case in bench_step.cases(sizes) + bench_step.ragged_cases(sizes) + bench_step.traced_cases(sizes):
        assert case.subject in subjects.makers(sizes == "smoke")
        assert case.subject in bench_step.MOST_STEPS
        if case.smoke or case == bench_step.Case("4x4 transformer", 1):
            chains = case.chains(CPU, graphs=False)
            assert chains.plan.steps == (4 if case.smoke else 16)
            facts = case.facts(chains, "eager")
            assert (facts["subject"], facts["batch"]) == (case.subject, len(chains.x))


# ------------------------------------------------------------------------------------------------- traces


def event(cat, name, ts, dur=1.0, correlation=None):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


TRACE = [
    event("user_annotation", "ticks" + device_trace.UNTIL_DONE, 0, 100),
    event("user_annotation", "ticks", 0, 20),
    event("gpu_user_annotation", "network", 30, 60),
    event("user_annotation", "network", 2, 4),
    event("cuda_runtime", "cudaLaunchKernel", 3, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 8, correlation=2),
    event("cuda_runtime", "cudaStreamSynchronize", 9),
    event("cuda_runtime", "cudaMemcpyAsync", 10, correlation=4),
    event("cuda_runtime", "cudaGraphLaunch", 11, correlation=5),
    event("cuda_runtime", "cudaDeviceSynchronize", 25),
    event("kernel", "conv", 30, 90.0, correlation=1),
    event("kernel", "denoise_kernel", 40, 6.0, correlation=2),
    event("kernel", "nobody's", 50, 3.0),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 60, 1.0, correlation=4),
    event("kernel", "of something else", 150, 50.0, correlation=1),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_where_the_time_of_a_trace_went():
    found = device_trace.time_by_place(TRACE, "ticks", "network")
    assert found["inside_us"] == 90
    assert found["outside_us"] == {"denoise_kernel": 6, "nobody's": 3, "Memcpy DtoH (Device -> Pageable)": 1}
    assert found["outside_share"] == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="no device work"):
        device_trace.time_by_place(TRACE[:4], "ticks", "network")


def test_where_the_host_of_a_trace_waited():
    found = device_trace.waits(TRACE, "ticks")
    assert found == {
        "replays": 1,
        "waits": 2,
        "of": {"cudaStreamSynchronize": 1, "Memcpy DtoH (Device -> Pageable)": 1},
    }
    with pytest.raises(RuntimeError, match="no replay"):
        device_trace.waits(TRACE[:8], "ticks")


def test_a_recording_has_the_ranges_of_works_and_modules():
    module = torch.nn.Linear(2, 2)

    def work():
        with device_trace.marked(module, "network"):
            module(torch.ones(1, 2))
            module(torch.ones(1, 2))

    events = device_trace.record({"ticks": work, "other": lambda: module(torch.ones(1, 2))}, CPU)
    ((start, end),) = device_trace.spans(events, "ticks")
    networks = device_trace.spans(events, "network")
    assert len(networks) == 2
    assert all(start <= s < e <= end for s, e in networks)
    assert len(device_trace.spans(events, "other" + device_trace.UNTIL_DONE)) == 1
