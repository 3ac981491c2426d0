"""Captures on a tape in place of a GPU: replays equal eager runs, and errors leave no capture under way."""

from functools import partial

import pytest
import torch
from small_models import TINY, randomise
from tape import Tape

import ipr_fast
from ipr_fast import Schedule, fixed_patches, random_patches
from ipr_fast.engine.capture_check import CaptureError
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graph_cache import _kept
from ipr_fast.engine.graphs import Graphs
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.runner import Runner
from ipr_fast.models import PatchTransformer
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import make_selector


def rows(x, iteration):
    """A Python mask_fn with another number of patches for each chain and iteration, sometimes none."""
    mask = torch.zeros(len(x), 16, dtype=torch.bool)
    for chain in range(len(x)):
        mask[chain, : (chain * iteration) % 7] = True
    return mask


MASKS = [random_patches(0.3), random_patches(0.5, fixed=True), fixed_patches([1, 2, 7, 11]), rows]


@pytest.mark.parametrize("mask_fn", MASKS, ids=["random", "one region", "fixed", "python"])
@pytest.mark.parametrize("max_chains", ["auto", 5])
def test_replays_equal_eager_runs(tape, model, finished, ragged_known, mask_fn, max_chains):
    """Ragged chains, a second seed and a second schedule on the same graphs, to float32 rounding: lanes differ."""
    for seed, schedule in ((3, Schedule(10, 0.8)), (2**63 + 5, Schedule(4, 0.5)), (3, Schedule(3, 0.0))):
        options = {"model": model, "known": ragged_known, "seed": seed, "schedule": schedule}
        runs = [
            ipr_fast.refine_batch(finished, mask_fn, 4, backend=backend, max_chains=most, **options)
            for backend, most in (("auto", max_chains), ("torch", "auto"))
        ]
        torch.testing.assert_close(*runs, atol=1e-5, rtol=0)
        assert (runs[0] - finished).abs().max() > 0.1
    assert tape.replayed


@pytest.mark.parametrize("noise", ["random", "fixed"])
def test_generation_and_refinement_on_graphs_equal_the_reference(tape, model, finished, ragged_known, noise):
    runs = []
    for backend in ("auto", "reference"):
        options = {"model": model, "known": ragged_known, "seed": 4, "backend": backend}
        x = ipr_fast.generate_batch(12, known_values=finished, schedule=Schedule(3, 0.5), **options)
        runs.append(ipr_fast.refine_batch(x, random_patches(), 3, noise=noise, **options))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupt_leaves_nothing_half_captured(tape, model, finished, at):
    tape.fail_at = at
    with pytest.raises(KeyboardInterrupt):
        ipr_fast.refine_batch(finished, random_patches(), 2, model=model)
    assert not _kept
    tape.fail_at = None
    expected = ipr_fast.refine_batch(finished, random_patches(), 2, model=model, backend="torch")
    torch.testing.assert_close(ipr_fast.refine_batch(finished, random_patches(), 2, model=model), expected)


def test_an_interrupted_callback_and_a_call_within_a_call(tape, model, finished):
    def inner(iteration, x):
        ipr_fast.refine_batch(x, random_patches(), 1, model=model)

    def interrupt(iteration, x):
        raise KeyboardInterrupt

    expected = ipr_fast.refine_batch(finished, random_patches(), 3, model=model, backend="torch")
    with pytest.raises(KeyboardInterrupt):
        ipr_fast.refine_batch(finished, random_patches(), 3, model=model, callback=interrupt)
    found = ipr_fast.refine_batch(finished, random_patches(), 3, model=model, callback=inner)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_model_that_looks_at_the_data_is_named_with_the_line(tape, model, finished):
    def curious(patches, levels, active=None):
        if levels.max() > 2:
            return None
        return model(patches, levels, active)

    curious.grid = model.grid
    with pytest.raises(
        CaptureError, match=r"(?s)tick of .*curious cannot.*is_nonzero.* in curious .*test_graphs.py.*torch"
    ):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=curious)
    ipr_fast.refine_batch(finished, random_patches(), 1, model=curious, backend="torch")


def test_a_captured_context_must_be_overwritten(tape, model, finished):
    class Forgetful(PatchTransformer):
        def prepare(self, patches, active, out=None, *, table=None):
            return super().prepare(patches, active)

    forgetful = randomise(Forgetful(TINY), seed=0)
    with pytest.raises(ValueError, match="prepare must overwrite `out` and return it"):
        ipr_fast.refine_batch(finished, random_patches(), 2, model=forgetful)


def test_a_context_without_first_runs_all_lanes(tape, model, finished, ragged_known):
    class Whole(PatchTransformer):
        def prepare(self, patches, active, out=None, *, table=None):
            made = super().prepare(patches, active, None if out is None else out.inner)
            return out or Context(made)

        def forward(self, patches, levels, active=None, *, context=None, **prepared):
            return super().forward(patches, levels, active, context=context and context.inner, **prepared)

    class Context:
        def __init__(self, inner):
            self.inner = inner

    whole = randomise(Whole(TINY), seed=0)
    for backend in ("auto", "torch"):
        runs = [
            ipr_fast.refine_batch(finished, random_patches(), 3, model=m, known=ragged_known, backend=backend)
            for m in (whole, model)
        ]
        torch.testing.assert_close(*runs, atol=1e-5, rtol=0)


def test_whole_iterations_as_one_graph(model, finished, ragged_known):
    sampling, tape, results = Sampling(Schedule(10, 0.8)), Tape(), []
    for options in ({"capture": tape, "whole_iterations": True}, {}):
        runner = Runner(PatchLanes(model, 16, finished.device, PatchSettings.of(sampling)), **options)
        engine = Engine(runner, model.grid.to_patches(finished), torch.arange(12), sampling)
        select = make_selector(random_patches(), model.grid, ~ragged_known, torch.arange(12), 0)
        for iteration in (1, 2, 3):
            engine.begin(iteration)
            engine.regenerate(select(iteration, engine.iteration, None))
        results.append(engine.values)
    assert tape.captured == ["iteration of PatchTransformer"]
    assert tape.replayed == [0, 0]  # the first iteration is eager, to note its variance mix
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_graphs_beyond_the_most_are_dropped_all_together():
    class Uncaptured(Tape):
        def __call__(self, name, function):
            return function

    graphs, calls = Graphs(Uncaptured(), most=3), []

    def capture(*keys):
        missing = graphs.missing(keys)
        for key in missing:
            graphs.add(key, key, partial(calls.append, key))
        return missing

    assert capture("a", "b") == ["a", "b"]
    assert capture("b", "c", "b") == ["c"]
    assert capture("a", "c") == []
    assert capture("c", "d") == ["c", "d"]
    assert list(graphs) == ["c", "d"]
    graphs["c"]()
    assert calls == ["c"]


def test_a_wave_whose_graphs_pass_the_most_runs_on_new_ones(tape, model, finished, ragged_known, monkeypatch):
    monkeypatch.setattr(Graphs.__init__, "__defaults__", (4,))
    options = {"model": model, "known": ragged_known}
    expected = ipr_fast.refine_batch(finished, random_patches(0.6), 3, backend="torch", **options)
    for _ in range(2):
        for most in (5, "auto"):
            found = ipr_fast.refine_batch(finished, random_patches(0.6), 3, max_chains=most, **options)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
