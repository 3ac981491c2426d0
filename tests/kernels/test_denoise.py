import pytest
import torch

from ipr_fast import ActivePatches
from ipr_fast.kernels.denoise import denoise
from ipr_fast.kernels.philox import STREAM_POSTERIOR, patch_normals, seed_tensor
from ipr_fast.sampling import flow

BATCH, PATCHES = 8, 9
COUNTERS = {"seed": seed_tensor(3, "cpu"), "step": torch.full((BATCH,), 6), "iteration": torch.tensor(2)}


def make_step(numel, generator, *, mix):
    mask = torch.rand(BATCH, PATCHES, generator=generator) < 0.6
    mask[0], mask[1] = False, True
    active = ActivePatches.from_mask(mask, slots=PATCHES)
    shape = active.index.shape
    level = torch.randint(1, 11, shape, generator=generator) / 10
    next_level = (level - torch.randint(0, 3, shape, generator=generator) / 10).clamp(min=0)
    level[:, 0], next_level[:, 0] = 1.0, 1.0  # waiting
    level[:, 1], next_level[:, 1] = 0.0, 0.0  # done
    level[:, 2], next_level[:, 2] = 1.0, 0.0  # all at once
    return {
        "patches": torch.randn(BATCH, PATCHES, numel, generator=generator),
        "index": active.index,
        "level": level * active.occupied,
        "next_level": next_level * active.occupied,
        "velocity": torch.randn(*shape, numel, generator=generator),
        "variance_mix": torch.rand(*shape, numel, generator=generator) if mix else None,
        "chain_ids": torch.randperm(BATCH, generator=generator) + 50,
    }, active


@pytest.mark.parametrize("numel", [1, 5, 64])
@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize(("eta", "tau"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("preserving", [False, True])
def test_it_is_the_posterior_step_of_the_moving_slots(numel, mix, eta, tau, preserving, generator):
    inputs, active = make_step(numel, generator, mix=mix)
    before = inputs["patches"].clone()
    denoise(**inputs, **COUNTERS, stochasticity=eta, temperature=tau, preserving=preserving)

    every = torch.arange(PATCHES).repeat(BATCH, 1)
    xi = patch_normals(3, STREAM_POSTERIOR, 6, 2, inputs["chain_ids"], every, numel)
    fields = ("velocity", "variance_mix", "level", "next_level")
    velocity, v, t, s = (None if inputs[f] is None else active.scatter(inputs[f], PATCHES) for f in fields)
    options = {"eta": eta, "tau": tau, "preserving": preserving}
    expected = flow.posterior_step(before, velocity, v, t[..., None], s[..., None], xi, **options)
    # Values below 8 and some thirty roundings, in another order than the definition's.
    torch.testing.assert_close(inputs["patches"], expected, atol=30 * 8 * 2**-24, rtol=0)

    moving = active.scatter((inputs["level"] != inputs["next_level"]) & active.occupied, PATCHES, fill=False)
    assert torch.equal(inputs["patches"][~moving], before[~moving])
    assert (inputs["patches"][moving] != before[moving]).any(1).all()


def test_the_last_step_has_no_noise_whatever_its_scale(generator):
    inputs, active = make_step(4, generator, mix=True)
    inputs["next_level"] = torch.zeros_like(inputs["next_level"])
    inputs["variance_mix"] = torch.full_like(inputs["variance_mix"], float("inf"))
    before = inputs["patches"].clone()
    denoise(**inputs, **COUNTERS, stochasticity=1.0, temperature=1e39)
    clean = before - active.scatter(inputs["level"][..., None] * inputs["velocity"], PATCHES)
    torch.testing.assert_close(inputs["patches"], clean, atol=1e-5, rtol=0)


def test_given_noise_takes_the_place_of_its_own(generator):
    inputs, _ = make_step(5, generator, mix=True)
    xi = patch_normals(3, STREAM_POSTERIOR, 6, 2, inputs["chain_ids"], torch.arange(PATCHES).repeat(BATCH, 1), 5)
    given = dict(inputs, patches=inputs["patches"].clone())
    denoise(**inputs, **COUNTERS, stochasticity=0.5, temperature=1.0)
    denoise(**given, **COUNTERS | {"seed": seed_tensor(99, "cpu")}, stochasticity=0.5, temperature=1.0, noise=xi)
    assert torch.equal(given["patches"], inputs["patches"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_the_slots_gets_their_new_values_and_may_give_a_logit(dtype, generator):
    inputs, active = make_step(5, generator, mix=True)
    logit = torch.randn(inputs["variance_mix"].shape, generator=generator)
    inputs["variance_mix"] = logit.sigmoid()
    given = dict(inputs, patches=inputs["patches"].clone(), variance_mix=logit)
    values = active.gather(inputs["patches"]).to(dtype)
    settings = {**COUNTERS, "stochasticity": 0.5, "temperature": 1.0}
    denoise(**inputs, **settings)
    denoise(**given, **settings, mix_is_logit=True, slot_values=values)
    assert torch.equal(given["patches"], inputs["patches"])
    slots = active.occupied
    assert torch.equal(values[slots], active.gather(inputs["patches"]).to(dtype)[slots])


def test_idle_slots_with_undefined_predictions_harm_nothing(generator):
    inputs, active = make_step(8, generator, mix=True)
    idle = (inputs["level"] == inputs["next_level"]) | ~active.occupied
    inputs["velocity"][idle] = float("nan")
    inputs["variance_mix"][idle] = float("inf")
    denoise(**inputs, **COUNTERS, stochasticity=0.5, temperature=1.0)
    assert torch.isfinite(inputs["patches"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_predictions_meet_a_float32_state(dtype, generator):
    inputs, _ = make_step(8, generator, mix=True)
    rounded = dict(inputs, patches=inputs["patches"].clone())
    for name in ("velocity", "variance_mix"):
        low = inputs[name].to(dtype)
        inputs[name], rounded[name] = low, low.float()
    for run in (inputs, rounded):
        denoise(**run, **COUNTERS, stochasticity=0.5, temperature=1.0)
    assert torch.equal(inputs["patches"], rounded["patches"])


def test_no_slots_and_no_chains():
    for batch, slots in ((0, 3), (2, 0)):
        patches = torch.ones(batch, 4, 8)
        denoise(
            patches,
            index=torch.full((batch, slots), -1, dtype=torch.int32),
            level=torch.zeros(batch, slots),
            next_level=torch.zeros(batch, slots),
            velocity=torch.zeros(batch, slots, 8),
            variance_mix=None,
            chain_ids=torch.arange(batch),
            seed=seed_tensor(0, "cpu"),
            step=torch.zeros(batch, dtype=torch.int64),
            iteration=torch.tensor(1),
            stochasticity=0.5,
            temperature=1.0,
        )
        assert (patches == 1).all()
