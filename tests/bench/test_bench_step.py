"""What bench/bench_step.py measures: chains, their checks, and clues."""

import bench_step
import pytest
import torch
from small_models import TINY, randomise
from support import chains as chains_module
from support import subjects
from support.chains import Chains, Replayed
from support.harness import quartiles
from support.records import Record
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
    before = chains.engine.values.clone()
    for _ in range(2):  # a round leaves nothing behind for the next
        chains.begin()
        bench_step.repeat(chains.tick, chains.plan.steps)
        assert torch.equal(chains.lanes.state.values, before)
        bench_step.against_the_reference(chains, chains.lanes.state.values).hold()
    chains.iterate()
    assert not torch.equal(chains.engine.values, before)
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
    chains.engine.values[1:3, 3] += value
    with pytest.raises(AssertionError, match="against='the reference'"):
        bench_step.against_the_reference(chains, chains.engine.values).hold()


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
    bench_step.against_the_reference(chains, chains.lanes.state.values).hold()


def test_the_share_outside_is_by_the_round():
    facts = {"units": 4, "against": {"network": {"units": 4, "seconds": [0.5, 0.9, 0.8]}}}
    found = bench_step.outside_share(Record("tick", "step", [1.0, 1.0, 1.0], facts))
    assert found == {"outside_share": pytest.approx(quartiles([0.5, 0.1, 0.2]))}


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
