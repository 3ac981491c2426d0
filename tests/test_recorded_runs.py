"""The reference and the engine repeat whole runs of the published implementation, given its noise."""

from types import SimpleNamespace

import pytest
import torch
from recordings import model_of, read

from ipr_fast import Schedule, reference
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import slot_bucket
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import Selection

RUNS = {"tiny_gray.clued": "tiny_gray", "tiny_rgb.free": "tiny_rgb"}  # run: model
TOLERANCE = 2e-5  # absolute, on values of order one: float32 rounding over up to 64 denoiser calls


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """A recorded run: its start and, per regeneration, schedule, active patches, noise, levels and result."""
    tensors, settings = read(request.param)
    model = model_of(RUNS[request.param])
    patches = {name: model.grid.to_patches(t) for name, t in tensors.items() if t.shape[-3:] == model.grid.sample_shape}
    known = tensors["known"][0] if "known" in tensors else torch.zeros(model.grid.num_patches, dtype=torch.bool)
    stages = []
    for name in ("init", *(f"iter{i}" for i in range(settings["iters"]))):
        prefix = "" if name == "init" else "ipr_"
        active = ~known
        if name != "init":
            active = torch.zeros_like(known).index_fill(0, tensors[f"{name}.reset"], True)
        stage = SimpleNamespace(
            schedule=Schedule(settings[f"{prefix}steps_per_patch"], settings[f"{prefix}overlap"]),
            active=active,
            initial=patches["z0" if name == "init" else f"{name}.renoised"][0],
            noise=patches[f"{name}.noise"],
            levels=tensors[f"{name}.schedule"],
            z=patches[f"{name}.z"][0],
        )
        stages.append(stage)
    start = patches["known_values"][0] if "known_values" in patches else torch.full_like(patches["z0"][0], torch.nan)
    options = {name: settings[name] for name in ("stochasticity", "temperature")}
    return SimpleNamespace(model=model, options=options, start=start, stages=stages, final=patches["final"][0])


def test_the_reference_repeats_it(run):
    z = run.start
    for stage in run.stages:
        z = torch.where(stage.active[:, None], stage.initial, z)
        z, levels = reference.regenerate(
            run.model, z, stage.active, stage.schedule, noise=stage.noise.__getitem__, **run.options
        )
        assert torch.equal(levels, stage.levels)
        torch.testing.assert_close(z, stage.z, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(z, run.final, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spare_slots", [False, True])
def test_the_engine_repeats_it(run, spare_slots):
    """In a batch with a chain that regenerates other patches, and with padding slots."""
    other = torch.randn(run.final.shape, generator=torch.Generator().manual_seed(0))
    z = torch.stack([run.start, other])
    for stage in run.stages:
        mask = torch.stack([stage.active, stage.active.roll(1)])
        z = torch.where(mask[..., None], torch.nan, z)  # what the given noise has to replace
        sampling = Sampling(stage.schedule, **run.options)
        runner = Runner(PatchLanes(run.model, 2, z.device, PatchSettings.of(sampling)))
        engine = Engine(runner, z, torch.arange(2), sampling)
        selected = Selection(mask, mask.sum(1), varies=spare_slots)
        count, levels = int(stage.active.sum()), [stage.active.float()]
        slots = slot_bucket(count, len(stage.active)) if spare_slots else count

        def noise(chains, step, stage=stage):
            pair = (stage.initial, other) if step < 0 else (stage.noise[step], stage.noise[step].roll(1, 0))
            return torch.stack(pair)[chains]

        def on_step(runner=runner, slots=slots, levels=levels, active=stage.active):
            state = runner.lanes.slots(slots)
            levels.append(state.active.scatter(state.level, len(active))[0])

        engine.regenerate(selected, noise=noise, on_step=on_step)
        z = engine.values
        assert torch.equal(torch.stack(levels), stage.levels)
        torch.testing.assert_close(z[0], stage.z, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(z[0], run.final, atol=TOLERANCE, rtol=0)
    assert z.isfinite().all()
