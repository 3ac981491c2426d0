"""Lanes kept between calls, on a tape in place of a GPU: reused while the model is unchanged, dropped otherwise."""

import gc
import threading

import numpy as np
import pytest
import torch
from small_models import TINY, randomise

import ipr_fast
from ipr_fast import Schedule, random_patches
from ipr_fast.engine import graph_cache, memory
from ipr_fast.engine.graph_cache import _kept, drop_kept
from ipr_fast.models import PatchTransformer


def test_graphs_are_kept_for_later_calls(tape, model, finished):
    def run(**options):
        ipr_fast.refine_batch(finished, random_patches(), 2, model=model, **options)
        return len(tape.captured)

    first = run()
    assert first == 2  # the beginning and a tick
    assert run(seed=9) == first
    assert run(seed=9, first_iteration=7, schedule=Schedule(2, 0.1), chain_ids=torch.arange(12) + 5) == first
    changed = run(temperature=0.5)
    assert changed > first
    assert run(stochasticity=0.1) > changed


def test_graphs_of_a_model_that_has_changed_are_not_used(tape, finished):
    model = randomise(PatchTransformer(TINY), seed=3)
    captured = []
    for change in (
        lambda: None,
        lambda: model.load_state_dict({n: 2 * t for n, t in model.state_dict().items()}, assign=True),
        lambda: model.layers[0].register_forward_hook(lambda *_: None),
        lambda: setattr(model, "strength", 3.0),
        lambda: setattr(model, "scale", torch.tensor(2.0)),
        lambda: model.scale.mul_(2),
        lambda: None,
    ):
        change()
        on_graphs = ipr_fast.refine_batch(finished, random_patches(), 2, model=model)
        eager = ipr_fast.refine_batch(finished, random_patches(), 2, model=model, backend="torch")
        torch.testing.assert_close(on_graphs, eager, atol=1e-5, rtol=0)
        captured.append(len(tape.captured))
    assert captured == [2, 4, 6, 8, 10, 12, 12]
    with torch.no_grad():
        model.patch_out.weight.mul_(0.5)  # in place: a graph reads the new values
    on_graphs = ipr_fast.refine_batch(finished, random_patches(), 2, model=model)
    eager = ipr_fast.refine_batch(finished, random_patches(), 2, model=model, backend="torch")
    torch.testing.assert_close(on_graphs, eager, atol=1e-5, rtol=0)
    assert len(tape.captured) == 12


class Act:
    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x):
        return x * self.strength


class Adjusted(PatchTransformer):
    """A model with parts that a graph holds as they were."""

    def __init__(self):
        super().__init__(TINY)
        self.act, self.plain, self.numbers = torch.nn.Tanh(), Act(1.0), np.ones(2)
        self.parts = torch.nn.ModuleList([torch.nn.Tanh(), torch.nn.Sigmoid()])
        self.calls = 0

    def forward(self, *arguments, **prepared):
        self.calls += 1
        prediction = super().forward(*arguments, **prepared)
        velocity = self.plain(self.parts[0](self.act(prediction.velocity))) * float(self.numbers[0])
        return prediction._replace(velocity=velocity)


CHANGES = [
    lambda model: setattr(model, "act", torch.nn.Sigmoid()),
    lambda model: setattr(model, "parts", torch.nn.ModuleList([model.parts[1], model.parts[0]])),
    lambda model: setattr(model, "parts", torch.nn.ModuleList([model.parts[1], model.parts[1]])),
    lambda model: setattr(model.plain, "strength", 3.0),
    lambda model: setattr(model, "plain", Act(2.0)),
    lambda model: setattr(model, "plain", lambda x: -x),
    lambda model: model.numbers.__setitem__(0, 3.0),
    lambda model: [setattr(model, "plain", Act(2.0)) or setattr(model, "plain", Act(s)) for s in (4.0, 5.0)],
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
@pytest.mark.parametrize("when", ["between calls", "in a callback", "in a mask_fn"])
def test_changes_of_structure_and_of_plain_objects_are_noticed(tape, finished, number, when):
    results = []
    for backend in ("auto", "torch"):
        model, change = randomise(Adjusted(), seed=3), CHANGES[number]

        def callback(iteration, x, model=model, change=change):
            if iteration == 2 and when == "in a callback":
                change(model)

        def mask_fn(x, iteration, model=model, change=change):
            if iteration == 2 and when == "in a mask_fn":
                change(model)
            return torch.arange(16).expand(len(x), -1) % 4 == iteration % 4

        options = {"model": model, "backend": backend, "callback": callback}
        x = ipr_fast.refine_batch(finished, mask_fn, 3, **options)
        if when == "between calls":
            change(model)
        results.append(ipr_fast.refine_batch(x, mask_fn, 3, **options))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_a_model_that_counts_its_calls_is_not_captured_again_for_it(tape, finished):
    model = randomise(Adjusted(), seed=3)
    for _ in range(3):
        ipr_fast.refine_batch(finished, random_patches(), 3, model=model, callback=lambda iteration, x: None)
    assert len(tape.captured) == 2


def test_weights_changed_in_a_callback_are_the_ones_used(tape, finished):
    results = []
    for backend in ("auto", "torch", "reference"):
        model = randomise(PatchTransformer(TINY), seed=3)

        def halve(iteration, x, model=model):
            for parameter in model.parameters():
                parameter.data.mul_(0.8)

        results.append(
            ipr_fast.refine_batch(finished, random_patches(), 3, model=model, backend=backend, callback=halve)
        )
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[1], results[2], atol=1e-4, rtol=0)


def test_threads_with_one_model(tape, model, finished):
    expected = ipr_fast.refine_batch(finished, random_patches(), 2, model=model, backend="torch")
    results, errors = [], []

    def work():
        try:
            for _ in range(4):
                results.append(ipr_fast.refine_batch(finished, random_patches(), 2, model=model))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert len(results) == 16
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_out_of_memory_says_how_many_to_take(tape, finished):
    class Large(PatchTransformer):
        def forward(self, patches, levels, active=None, **prepared):
            raise torch.OutOfMemoryError("CUDA out of memory")

    large = randomise(Large(TINY), seed=0)
    for backend in ("auto", "torch"):
        with pytest.raises(
            torch.OutOfMemoryError, match=r"with (16|12) chains at a time; pass max_chains=(8|6) or fewer"
        ):
            ipr_fast.refine_batch(finished, random_patches(), 1, model=large, backend=backend)
    with pytest.raises(torch.OutOfMemoryError, match="with 1 chains at a time: not even one fits"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=large, max_chains=1)


def test_few_graphs_are_kept_and_none_of_a_model_that_is_gone(tape, model, finished):
    for batch in (1, 2, 4, 8, 12, 3):
        ipr_fast.refine_batch(finished[:batch], random_patches(), 1, model=model)
        assert len(_kept) <= 4
    passing = randomise(PatchTransformer(TINY), seed=3)
    ipr_fast.refine_batch(finished, random_patches(), 1, model=passing)
    keys = set(_kept)
    assert any(key[0] == id(passing) for key in keys)
    number = id(passing)
    del passing
    gc.collect()
    assert not any(key[0] == number for key in _kept)


def test_a_callable_that_is_no_module_is_captured_anew(tape, model, finished):
    def denoiser(patches, levels, active=None):
        return model(patches, levels, active)

    denoiser.grid = model.grid
    for _ in range(2):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=denoiser)
    assert not _kept
    assert len(tape.captured) == 4


def test_what_is_kept_has_a_bound_in_bytes(tape, model, finished, monkeypatch):
    monkeypatch.setattr(graph_cache, "FEW_CHAINS", 0)  # count the bytes on a CPU too
    for total, kept in ((1e12, 2), (1.0, 0)):
        drop_kept()
        monkeypatch.setattr(memory, "total_bytes", lambda device, total=total: total)
        for batch in (2, 4):
            ipr_fast.refine_batch(finished[:batch], random_patches(), 1, model=model)
        assert len(_kept) == kept


def test_calls_without_a_model_find_their_graphs_again(tape):
    x = torch.zeros(2, 1, 32, 32)
    for _ in range(3):
        ipr_fast.refine_batch(x, random_patches(), 1, schedule=Schedule(1))
    assert len(tape.captured) == 2
