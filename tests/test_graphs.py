"""Captures, on a tape in place of a GPU: replays compute what Python does, and nothing is left half done."""

import gc
import threading

import numpy as np
import pytest
import torch
from small_models import TINY, randomise
from tape import Tape

import ipr_fast
from ipr_fast import Schedule, fixed_patches, memory, random_patches, reuse
from ipr_fast import refine as refine_module
from ipr_fast.engine import Engine, Sampling
from ipr_fast.graphs import Graphs
from ipr_fast.lanes import Lanes
from ipr_fast.models import PatchTransformer
from ipr_fast.reuse import _kept, drop_kept
from ipr_fast.selection import Selector
from ipr_fast.watch import CaptureError, Watch, without_compile


@pytest.fixture
def tape(monkeypatch):
    """Every call captures, on this tape."""
    tape = Tape()
    monkeypatch.setattr(refine_module, "CudaCapture", lambda device: tape)
    monkeypatch.setattr(refine_module, "_backend", lambda name, device: "graphs" if name == "auto" else name)
    drop_kept()
    yield tape
    drop_kept()


def rows(x, iteration):
    """A mask of Python's, ragged, other slots in each iteration, sometimes none."""
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


def test_one_finalizer_a_model(tape, model, finished):
    for seed in range(5):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, seed=seed)
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, stochasticity=seed / 10)
    assert list(reuse._watched).count(id(model)) == 1
    assert len(reuse._watched) <= 2 + len(_kept)


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


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "look",
    [
        lambda x: int(x[0]),
        lambda x: torch.where(x > 0),
        lambda x: torch.argwhere(x),
        lambda x: torch.allclose(x, x),
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: bool(x[0] > 0),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2])),
        lambda x: x.to("meta"),
    ],
)
def test_the_watch_finds_what_a_graph_cannot_hold(look, inference):
    with torch.inference_mode(inference):  # in which the mode sees other operations
        with Watch("this"):
            torch.where(torch.randn(3) > 0, torch.ones(3), 0.0) + 1
        with pytest.raises(CaptureError, match="this cannot be captured"), Watch("this"):
            look(torch.randn(3))


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda x: x[torch.tensor([0, 1])], "indices are copied"),
        (lambda x: x.index_put_((torch.tensor([0, 1]),), x[0]), "indices are copied"),
        (lambda x: x.copy_(torch.ones(3)), "copies between"),
        (lambda x: x[x > 0], "bool mask"),
        (lambda x: x.__setitem__(x > 0, torch.ones(3, device=x.device)), "bool mask"),
    ],
)
def test_the_watch_over_a_device_finds_copies_to_it(look, why):
    device = torch.device("meta")
    with pytest.raises(CaptureError, match=why), Watch("this", device):
        look(torch.zeros(3, device=device))


def test_the_watch_over_a_device_lets_the_host_do_what_it_likes():
    device = torch.device("meta")
    with Watch("this", device):
        assert torch.ones(3).sum().item() == 3
        assert torch.ones(3)[torch.tensor([True, False, True])].shape == (2,)
        x = torch.zeros(3, device=device)
        x.index_put_((x > 0,), torch.tensor(1.0))  # x[x > 0] = 1 on a GPU, which is masked_fill
        torch.where(x > 0, x, 1.0)


def test_what_torch_compiles_still_compiles_after_the_first_run():
    """Modes such as ours make torch.compile give a function up for good, if they see its first call."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=backend, fullgraph=True)
    with without_compile(), Watch("this"):
        function(torch.ones(3))
    with without_compile(), memory.PeakBytes():
        function(torch.ones(3))
    assert not compiled
    function(torch.ones(3))
    assert len(compiled) == 1


def test_what_is_kept_has_a_bound_in_bytes(tape, model, finished, monkeypatch):
    monkeypatch.setattr(reuse, "FEW_CHAINS", 0)  # count the bytes on a CPU too
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


def test_a_captured_context_must_be_overwritten(tape, model, finished):
    class Forgetful(PatchTransformer):
        def prepare(self, patches, active, out=None):
            return super().prepare(patches, active)

    forgetful = randomise(Forgetful(TINY), seed=0)
    with pytest.raises(TypeError, match="prepare must overwrite and return"):
        ipr_fast.refine_batch(finished, random_patches(), 2, model=forgetful)


def test_a_context_without_first_runs_all_lanes(tape, model, finished, ragged_known):
    class Whole(PatchTransformer):
        def prepare(self, patches, active, out=None):
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
    for lanes in (
        Lanes(model, 16, finished.device, sampling.settings(), tape, whole_iterations=True),
        Lanes(model, 16, finished.device, sampling.settings()),
    ):
        engine = Engine(model, model.grid.to_patches(finished), torch.arange(12), sampling, lanes)
        select = Selector(random_patches(), model.grid, ~ragged_known, torch.arange(12), 0)
        for iteration in (1, 2, 3):
            engine.begin(iteration)
            engine.regenerate(select(iteration, engine.iteration, None))
        results.append(engine.patches)
    assert tape.captured == ["iteration of PatchTransformer"]
    assert tape.replayed == [0, 0, 0]
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_graphs_beyond_the_most_are_dropped_oldest_first():
    graphs, calls = Graphs(Tape(), most=2), []
    graphs.capture = lambda name, function: function
    for key in "ab":
        graphs.add(key, key, lambda key=key: calls.append(key))
    assert graphs.touch("a")
    graphs.add("c", "c", lambda: calls.append("c"))
    assert not graphs.touch("b")
    assert graphs.touch("a")
    graphs.replay("a")
    graphs.replay("c")
    assert calls == ["a", "c"]
    assert len(graphs) == 2
