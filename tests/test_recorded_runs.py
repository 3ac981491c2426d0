"""Whole runs of the published implementation, repeated with its noise by the reference and by the engine."""

from types import SimpleNamespace

import pytest
import torch
from recordings import model_of, read

from ipr_fast import Schedule, reference
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.lanes import Lanes, Settings
from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import slot_bucket
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection

RUNS = {"tiny_gray.clued": "tiny_gray", "tiny_rgb.free": "tiny_rgb"}  # and the models that made them
WITHIN = 2e-5  # of z, whose values are of order one: float32 over all of a run's denoiser calls, up to 64


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """A run's start, and each regeneration: schedule, which patches are active, their noise, levels, result."""
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
        part = SimpleNamespace(
            schedule=Schedule(settings[f"{prefix}steps_per_patch"], settings[f"{prefix}overlap"]),
            active=active,
            initial=patches["z0" if name == "init" else f"{name}.renoised"][0],
            noise=patches[f"{name}.noise"],
            levels=tensors[f"{name}.schedule"],
            z=patches[f"{name}.z"][0],
        )
        parts.append(part)
    start = patches["known_values"][0] if "known_values" in patches else torch.full_like(patches["z0"][0], torch.nan)
    options = {name: settings[name] for name in ("stochasticity", "temperature")}
    return SimpleNamespace(model=model, options=options, start=start, parts=parts, final=patches["final"][0])


def test_the_reference_repeats_it(run):
    z = run.start
    for part in run.parts:
        z = torch.where(part.active[:, None], part.initial, z)
        z, levels = reference.regenerate(
            run.model, z, part.active, part.schedule, noise=part.noise.__getitem__, **run.options
        )
        assert torch.equal(levels, part.levels)
        torch.testing.assert_close(z, part.z, atol=WITHIN, rtol=0)
    torch.testing.assert_close(z, run.final, atol=WITHIN, rtol=0)


@pytest.mark.parametrize("spare_slots", [False, True])
def test_the_engine_repeats_it(run, spare_slots):
    """Beside another chain that regenerates other patches, and with padding slots."""
    other = torch.randn(run.final.shape, generator=torch.Generator().manual_seed(0))
    z = torch.stack([run.start, other])
    for part in run.parts:
        mask = torch.stack([part.active, part.active.roll(1)])
        z = torch.where(mask[..., None], torch.nan, z)  # what the given noise has to replace
        sampling = Sampling(part.schedule, **run.options)
        runner = Runner(Lanes(run.model, 2, z.device, Settings.of(sampling)))
        engine = Engine(runner, z, torch.arange(2), sampling)
        selected = Selection(mask, mask.sum(1), varies=spare_slots)
        count, levels = int(part.active.sum()), [part.active.float()]
        slots = slot_bucket(count, len(part.active)) if spare_slots else count

        def noise(chains, step, part=part):
            pair = (part.initial, other) if step < 0 else (part.noise[step], part.noise[step].roll(1, 0))
            return torch.stack(pair)[chains]

        def on_step(runner=runner, slots=slots, levels=levels, active=part.active):
            state = runner.lanes.slots(slots)
            levels.append(state.active.scatter(state.level, len(active))[0])

        engine.regenerate(selected, noise=noise, on_step=on_step)
        z = engine.patches
        assert torch.equal(torch.stack(levels), part.levels)
        torch.testing.assert_close(z[0], part.z, atol=WITHIN, rtol=0)
    torch.testing.assert_close(z[0], run.final, atol=WITHIN, rtol=0)
    assert z.isfinite().all()
