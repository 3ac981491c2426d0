"""Whole runs of the published implementation, repeated with its noise by the reference and by the engine."""

from types import SimpleNamespace

import pytest
import torch
from recordings import model_of, read

from ipr_fast import Schedule, reference
from ipr_fast.engine import Engine, GivenNoise, Sampling

RUNS = {"tiny_gray.clued": "tiny_gray", "tiny_rgb.free": "tiny_rgb"}  # and the models that made them
WITHIN = 2e-5  # of the published z: float32 over up to 36 denoiser calls


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """Each regeneration of a run: schedule, what it starts from, which patches are active, noise, levels, result."""
    tensors, settings = read(request.param)
    model = model_of(RUNS[request.param])
    patches = {name: model.grid.to_patches(t) for name, t in tensors.items() if t.shape[-3:] == model.grid.sample_shape}
    known = tensors["known"][0] if "known" in tensors else torch.zeros(model.grid.num_patches, dtype=torch.bool)
    parts = []
    for name in ("init", *(f"iter{i}" for i in range(settings["iters"]))):
        prefix = "" if name == "init" else "ipr_"
        active = ~known
        if name != "init":
            active = torch.zeros_like(known).index_fill(0, tensors[f"{name}.reset"], True)
        start = patches["z0" if name == "init" else f"{name}.renoised"][0]
        if "known_values" in patches:
            start = torch.where(known[:, None], patches["known_values"][0], start)
        part = SimpleNamespace(
            schedule=Schedule(settings[f"{prefix}steps_per_patch"], settings[f"{prefix}overlap"]),
            start=start,
            active=active,
            noise=patches[f"{name}.noise"],
            levels=tensors[f"{name}.schedule"],
            z=patches[f"{name}.z"][0],
        )
        parts.append(part)
    return SimpleNamespace(model=model, settings=settings, parts=parts, final=patches["final"][0])


def test_the_reference_repeats_it(run):
    for part in run.parts:
        z, levels = reference.regenerate(
            run.model,
            part.start,
            part.active,
            part.schedule,
            stochasticity=run.settings["stochasticity"],
            temperature=run.settings["temperature"],
            noise=part.noise.__getitem__,
        )
        assert torch.equal(levels, part.levels)
        torch.testing.assert_close(z, part.z, atol=WITHIN, rtol=0)
    torch.testing.assert_close(z, run.final, atol=WITHIN, rtol=0)


@pytest.mark.parametrize("spare_slots", [0, 3])
def test_the_engine_repeats_it(run, spare_slots):
    """Beside another chain that regenerates other patches, and with padding slots."""
    other = torch.randn(run.final.shape, generator=torch.Generator().manual_seed(0))
    for part in run.parts:
        count = int(part.active.sum())
        sampling = Sampling(part.schedule, run.settings["stochasticity"], run.settings["temperature"])
        engine = Engine(run.model, torch.stack([part.start, other]), torch.arange(2), sampling)
        mask = torch.stack([part.active, part.active.roll(1)])
        slots, levels = min(count + spare_slots, len(part.active)), [part.active.float()]

        def posterior(step, noise=part.noise):
            return torch.stack([noise[step], noise[step].roll(1, 0)])

        def on_step(engine=engine, slots=slots, levels=levels, count=count, active=part.active):
            state = engine._slots[slots]
            levels.append(state.active.scatter(state.level, len(active))[0])

        given = GivenNoise(torch.stack([part.start, other]), posterior)
        engine.regenerate(mask, count, slots=slots, noise=given, on_step=on_step)
        assert torch.equal(torch.stack(levels), part.levels)
        torch.testing.assert_close(engine.patches[0], part.z, atol=WITHIN, rtol=0)
    torch.testing.assert_close(engine.patches[0], run.final, atol=WITHIN, rtol=0)
