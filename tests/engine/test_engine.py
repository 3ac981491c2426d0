"""The engine equals the reference, and its steps never read data from the host."""

import copy
from dataclasses import fields

import pytest
import torch
from small_models import randomise

import ipr_fast
from ipr_fast import Schedule, fixed_patches, random_patches, reference
from ipr_fast.engine.capture_check import CaptureError, Watch, tensors_in
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.runner import Runner
from ipr_fast.kernels import philox
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import make_selector


class OneOff:
    """A Denoiser without `prepare`, variance head or log-variance."""

    def __init__(self, model: PatchTransformer) -> None:
        self.grid, self.inner = model.grid, model

    def __call__(self, patches, levels, active=None):
        return ipr_fast.Prediction(self.inner(patches, levels, active).velocity)


SCHEDULES = [Schedule(3, 0.0), Schedule(10, 0.8), Schedule(4, 0.9), Schedule(5, 1.0), Schedule(1, 0.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["transformer", "plain"])
def test_whole_ragged_runs_equal_the_reference(model, finished, ragged_known, schedule, plain):
    denoiser = OneOff(model) if plain else model
    runs = []
    for backend in ("torch", "reference"):
        options = {"model": denoiser, "known": ragged_known, "backend": backend, "seed": 5}
        x = ipr_fast.generate_batch(12, known_values=finished, schedule=schedule, **options)
        runs.append(ipr_fast.refine_batch(x, random_patches(0.3), 4, schedule=schedule, **options))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)
    assert runs[0].isfinite().all()


@pytest.mark.parametrize(("stochasticity", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.0), (0.3, 1.5)])
def test_the_engine_equals_the_reference_for_every_noise(model, finished, ragged_known, stochasticity, temperature):
    options = {"model": model, "known": ragged_known, "stochasticity": stochasticity, "temperature": temperature}
    runs = [
        ipr_fast.refine_batch(finished, random_patches(), 3, backend=backend, **options)
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_fixed_noise_is_that_of_the_initial_generation(model, ragged_known, backend):
    """With every patch renoised, no fresh noise and the same schedule, an iteration repeats the generation."""
    options = {"model": model, "schedule": Schedule(4, 0.5), "stochasticity": 0.0, "backend": backend, "seed": 9}
    ids = torch.arange(12) + 7
    x = ipr_fast.generate_batch(12, chain_ids=ids, **options)
    again = ipr_fast.refine_batch(x, ipr_fast.all_patches(), 3, noise="fixed", chain_ids=ids, **options)
    torch.testing.assert_close(again, x, atol=1e-5, rtol=0)
    fresh = ipr_fast.refine_batch(x, ipr_fast.all_patches(), 1, noise="random", chain_ids=ids, **options)
    assert (fresh - x).abs().max() > 0.1


def test_fixed_noise_in_the_engine_is_that_of_the_reference(model, finished, ragged_known):
    options = {"model": model, "known": ragged_known, "noise": "fixed", "seed": 2, "first_iteration": 5}
    policy = random_patches(0.5, fixed=True)
    runs = [ipr_fast.refine_batch(finished, policy, 3, backend=b, **options) for b in ("torch", "reference")]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


def test_a_model_that_needs_gradients_can_have_them(model, finished):
    """Models are called in inference mode; guidance by gradients leaves it and copies its inputs."""

    class Guided(OneOff):
        def __call__(self, patches, levels, active=None):
            prediction = super().__call__(patches, levels, active)
            with torch.inference_mode(False), torch.enable_grad():
                z = patches.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(z.square().sum(), z)
            assert torch.equal(gradient, 2 * patches)
            return prediction

    refined = ipr_fast.refine_batch(finished, random_patches(), 1, model=Guided(model), schedule=Schedule(2))
    assert not refined.is_inference()
    assert not ipr_fast.generate_batch(2, model=model).is_inference()


class Opinionated(OneOff):
    """A Denoiser whose log-variance is partly NaN and infinite."""

    def __call__(self, patches, levels, active=None):
        prediction = self.inner(patches, levels, active)
        odd = torch.where(prediction.log_variance > 0, torch.nan, prediction.log_variance)
        odd = torch.where(odd < -0.5, torch.inf, odd)
        return prediction._replace(log_variance=odd)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
def test_undefined_uncertainties_start_last_in_both(model, finished, ragged_known, schedule):
    options = {"model": Opinionated(model), "known": ragged_known, "schedule": schedule}
    runs = [
        ipr_fast.refine_batch(finished, random_patches(0.5), 2, backend=b, **options) for b in ("torch", "reference")
    ]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(finished, ragged_known, default):
    def run():
        x = ipr_fast.generate_batch(2, seed=1, schedule=Schedule(4, 0.7))
        return ipr_fast.refine_batch(x, random_patches(), 2, schedule=Schedule(10, 0.7))

    expected = run()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_public_reference_is_what_the_engine_computes(model, finished, ragged_known):
    """The engine against `reference.regenerate` called by hand with the noise that the counters define."""
    chain, schedule = 4, Schedule(10, 0.8)
    patches, unknown = model.grid.to_patches(finished)[chain], ~ragged_known[chain]

    def normals(stream, step):
        ids, every = torch.tensor([chain]), torch.arange(16)[None]
        return philox.patch_normals(7, stream, step, 3, ids, every, 16)[0]

    noised = torch.where(unknown[:, None], normals(philox.STREAM_RENOISE, 0), patches)
    expected, levels = reference.regenerate(
        model,
        noised,
        unknown,
        schedule,
        stochasticity=0.5,
        noise=lambda step: normals(philox.STREAM_POSTERIOR, step),
    )
    assert levels.shape == (schedule.steps(int(unknown.sum())) + 1, 16)
    assert torch.equal(levels[0], unknown.float())
    assert (levels[-1] == 0).all()
    refined = ipr_fast.refine_batch(
        finished,
        ipr_fast.all_patches(),
        1,
        model=model,
        known=ragged_known,
        seed=7,
        first_iteration=3,
        schedule=schedule,
    )
    torch.testing.assert_close(model.grid.to_patches(refined)[chain], expected, atol=1e-4, rtol=0)


def test_reference_refuses_a_batch(model, finished):
    with pytest.raises(ValueError, match=r"patches must be \(N, P\) and unknown a bool \(N,\), got"):
        reference.regenerate(
            model, model.grid.to_patches(finished), torch.ones(16), Schedule(3), stochasticity=0.5, noise=lambda s: None
        )


def test_reference_with_nothing_unknown_does_nothing(model, finished):
    patches = model.grid.to_patches(finished)[0]
    unknown = torch.zeros(16, dtype=torch.bool)
    out, levels = reference.regenerate(
        model, patches, unknown, Schedule(3, 0.0), stochasticity=0.5, noise=lambda step: None
    )
    assert torch.equal(out, patches)
    assert levels.tolist() == [[0.0] * 16]


def make_engine(model, finished, capture=None):
    """An engine of twelve chains, on lanes that capture if they are told how."""
    patches, sampling = model.grid.to_patches(finished), Sampling(Schedule(10, 0.8))
    runner = Runner(PatchLanes(model, 16, patches.device, PatchSettings.of(sampling)), capture)
    return Engine(runner, patches, torch.arange(len(patches), device=patches.device), sampling)


def small_unet():
    config = SRMUNetConfig(1, 16, 4, (32, 32, 32, 32), (False, True, False, False), 1, 32, 32, 16)
    return randomise(SRMUNet(config), seed=1)


def iterations(engine, select, numbers=(1, 2, 3)):
    """Iterations as `refine_batch` runs them."""
    for iteration in numbers:
        engine.begin(iteration)
        engine.regenerate(select(iteration, engine.iteration, None))


def selector(model, known, mask_fn=None):
    return make_selector(
        mask_fn or random_patches(), model.grid, ~known, torch.arange(len(known), device=known.device), 0
    )


@pytest.mark.parametrize("network", ["transformer", "unet", "unet in parts"])
def test_an_iteration_never_looks_at_the_data(model, finished, ragged_known, network, monkeypatch):
    """Whole iterations, ragged ones, under the watch that finds what a graph cannot hold."""
    if network != "transformer":
        model = small_unet()
        monkeypatch.setattr(SRMUNet, "cpu_bytes", 4 * 5 * model.config.map_numel if "parts" in network else 2**30)
    engine, select = make_engine(model, finished), selector(model, ragged_known)
    with Watch("an iteration"):
        iterations(engine, select)
    with pytest.raises(CaptureError, match="_local_scalar_dense"), Watch("this"):
        bool(ragged_known.any())  # the watch would notice


@pytest.mark.parametrize(
    ("network", "policy"),
    [
        ("transformer", random_patches(0.3)),
        ("transformer", random_patches(fixed=True)),
        ("transformer", fixed_patches([1, 2, 7])),
        ("unet", random_patches(0.3)),
    ],
    ids=str,
)
def test_an_iteration_runs_on_tensors_without_data(model, finished, ragged_known, network, policy):
    """On tensors without values: no look at the data, no copy to or from the host, nothing made on the wrong device."""
    model = (copy.deepcopy(model) if network == "transformer" else small_unet()).to("meta")
    select = selector(model, ragged_known, policy)
    engine = make_engine(model, finished.to("meta"))
    select.free, select.chain_ids = select.free.to("meta"), engine.chain_ids
    select.policy = policy.bind(model.grid, 12, engine.values.device)
    plan = engine._plan(select.counts)  # its order goes to the device
    assert len({run.lanes for wave in plan.waves for run in wave.phases}) > 2
    with Watch("an iteration"):
        iterations(engine, select)
    assert engine.values.is_meta
    with pytest.raises(CaptureError, match="copies between host and device"), Watch("this"):
        engine.values.copy_(model.grid.to_patches(finished))  # the watch would notice


def test_buffers_keep_their_addresses(model, finished, ragged_known):
    engine, select = make_engine(model, finished), selector(model, ragged_known)

    def addresses():
        lanes = engine.runner.lanes
        states = [lanes.state, *(lanes.slots(n) for n in sorted(lanes._slots))]
        buffers = tensors_in([[getattr(state, field.name) for field in fields(state)] for state in states])
        return [b.data_ptr() for b in (engine.values, *buffers, *lanes.tables, lanes.precomputed.context.keys_values)]

    seen = []
    for iteration in (1, 2, 3):
        iterations(engine, select, [iteration])
        seen.append(addresses())
    assert seen[0] == seen[1] == seen[2]
