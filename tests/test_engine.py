"""The engine against the reference, and what its step may not do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ipr_fast
from ipr_fast import Schedule, random_patches, reference
from ipr_fast.engine import Engine, Sampling
from ipr_fast.kernels import philox
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig


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


class NoHostSynchronisation(TorchDispatchMode):
    """Raises on what would make the host wait for a device, or give a shape that depends on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        indexed_by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.FORBIDDEN or indexed_by_mask:
            raise AssertionError(f"{name} looks at the data")
        return func(*args, **(kwargs or {}))


def make_engine(model, finished):
    patches = model.grid.to_patches(finished)
    return Engine(model, patches, torch.arange(len(patches)), Sampling(Schedule(10, 0.8)))


@pytest.mark.parametrize("network", ["transformer", "unet", "unet in parts"])
def test_an_iteration_never_looks_at_the_data(model, finished, ragged_known, network, monkeypatch):
    if network != "transformer":
        config = SRMUNetConfig(1, 16, 4, (32, 32, 32, 32), (False, True, False, False), 1, 32, 32, 16)
        model = SRMUNet(config).eval().requires_grad_(False)
        monkeypatch.setattr(SRMUNet, "cpu_bytes", 4 * 5 * config.map_numel if network == "unet in parts" else 2**30)
    engine, free = make_engine(model, finished), ~ragged_known
    policy = random_patches().bind(model.grid, 12, free.device)
    most_active = int(policy.sizes(free).max())
    with NoHostSynchronisation():
        for iteration in (1, 2):
            engine.begin(iteration)
            mask = policy.choose(free, seed=0, iteration=engine.iteration, chain_ids=engine.chains.chain_ids)
            engine.regenerate(mask, most_active)
    with pytest.raises(AssertionError, match="looks at the data"), NoHostSynchronisation():
        bool(free.any())  # the mode would notice


def test_buffers_keep_their_addresses(model, finished, ragged_known):
    engine, free = make_engine(model, finished), ~ragged_known
    policy = random_patches().bind(model.grid, 12, free.device)

    def addresses():
        slots, context = engine._slots[4], engine._context
        buffers = [engine.patches, engine.iteration, engine.chains.step, slots.level, slots.next_level, slots.start]
        return [b.data_ptr() for b in (*buffers, slots.active.index, slots.active.count, *context)]

    seen = []
    for iteration in (1, 2, 3):
        engine.begin(iteration)
        mask = policy.choose(free, seed=0, iteration=engine.iteration, chain_ids=engine.chains.chain_ids)
        engine.regenerate(mask, 4)
        seen.append(addresses())
    assert seen[0] == seen[1] == seen[2]
