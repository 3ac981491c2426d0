"""Sequences, images, video and a user's own grid are refined and generated as the reference says."""

import pytest
import torch
from small_models import randomise
from user_grids import GRIDS, AnyGrid, Rings

import ipr_fast
from ipr_fast import Schedule, all_patches, fixed_patches, random_patches, sweep_patches, violating_patches
from ipr_fast.models import PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig

SCHEDULE = Schedule(3, 0.5)
TOLERANCE = 1e-5  # float32, a few dozen steps of numbers about 1


LAYERS = {"width": 16, "depth": 2, "num_heads": 2, "level_features": 8}
NETWORKS = {
    "transformer, 1-D": PatchTransformerConfig(2, (12,), 3, value_range=None, **LAYERS),
    "transformer, 2-D": PatchTransformerConfig(1, (4, 9), (2, 3), value_range=None, pixel_width=3, **LAYERS),
    "transformer, 3-D": PatchTransformerConfig(1, (4, 4, 6), (2, 2, 3), value_range=None, **LAYERS),
    "unet, 2-D": SRMUNetConfig(1, (4, 9), (2, 3), (32, 32), (False, False), 1, 32, 32, 16),
}
PARALLEL = Schedule(3, 1.0)  # a network's own log-variances may be nearly equal: every patch starts at once


@pytest.fixture(params=[*GRIDS, *NETWORKS])
def small(request):
    torch.manual_seed(0)
    if request.param in GRIDS:
        return AnyGrid(GRIDS[request.param]).eval().requires_grad_(False)
    config = NETWORKS[request.param]
    if isinstance(config, SRMUNetConfig):
        return SRMUNet(config).eval().requires_grad_(False)
    return randomise(PatchTransformer(config), seed=1)


def make_known(grid, shape, generator):
    known = torch.rand(5, grid.num_patches, generator=generator) < 0.3
    known[0] = False
    return known if shape == "(B, N)" else known.view(5, *grid.grid_shape)


@pytest.mark.parametrize("shape", ["(B, N)", "(B, *grid_shape)"])
def test_the_engine_equals_the_reference(small, shape, generator):
    grid = small.grid
    known = make_known(grid, shape, generator)
    values = torch.randn(5, *grid.sample_shape, generator=generator)
    calls = {"model": small, "known": known, "schedule": SCHEDULE, "seed": 3}
    if not isinstance(small, AnyGrid):
        calls["schedule"] = PARALLEL
    x, expected = (
        ipr_fast.generate_batch(5, known_values=values, backend=backend, **calls) for backend in ("torch", "reference")
    )
    assert x.shape == (5, *grid.sample_shape)
    torch.testing.assert_close(x, expected, atol=TOLERANCE, rtol=0)
    kept = known.view(5, -1)
    assert torch.equal(grid.to_patches(x)[kept], grid.to_patches(values)[kept])

    def mask_fn(x, iteration):
        assert x.shape == (5, *grid.sample_shape)
        mask = grid.to_patches(x).mean(-1) > 0
        return mask if shape == "(B, N)" else mask.view(5, *grid.grid_shape)

    for choice in (random_patches(0.5), mask_fn, fixed_patches(~known)):
        refined, expected = (
            ipr_fast.refine_batch(x, choice, 3, max_chains=2, backend=backend, **calls)
            for backend in ("torch", "reference")
        )
        torch.testing.assert_close(refined, expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(grid.to_patches(refined)[kept], grid.to_patches(values)[kept])


def test_captured_graphs_hold_any_grid(small, tape, generator):
    x = torch.randn(5, *small.grid.sample_shape, generator=generator)
    calls = {"model": small, "schedule": PARALLEL, "seed": 3}
    captured, plain = (
        ipr_fast.refine_batch(x, random_patches(0.5), 3, backend=backend, **calls) for backend in ("graphs", "torch")
    )
    assert tape.replayed
    torch.testing.assert_close(captured, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_policies_callbacks_and_rewards_see_samples_of_the_grid(name, generator):
    model = AnyGrid(GRIDS[name]).eval()
    grid, seen = model.grid, []

    def judge(x):
        seen.append(tuple(x.shape))
        return (grid.to_patches(x).mean(-1) > 0).view(len(x), *grid.grid_shape)

    def reward(x):
        seen.append(tuple(x.shape))
        return x.flatten(1).sum(1)

    def callback(iteration, x):
        seen.append(tuple(x.shape))
        return torch.tensor([iteration > 1, False, False, False])

    calls = {"model": model, "schedule": SCHEDULE, "seed": 1}
    x = ipr_fast.generate_batch(4, **calls)
    for choice in (sweep_patches(0.5), violating_patches(judge, 0.5), all_patches()):
        accept = ipr_fast.Metropolis(reward, 1.0)
        runs = [
            ipr_fast.refine_batch(x, choice, 3, backend=backend, callback=callback, accept=accept, **calls)
            for backend in ("torch", "reference")
        ]
        torch.testing.assert_close(*runs, atol=TOLERANCE, rtol=0)
    assert set(seen) == {(4, *grid.sample_shape)}


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_latents_of_any_range_are_not_clamped(factor, generator):
    class Scale(AnyGrid):
        def forward(self, patches, levels, active=None):  # x = factor, to the number
            z = patches if active is None else active.gather(patches)
            return ipr_fast.Prediction((z - factor) / levels.clamp(min=0.01)[..., None])

    model = Scale(GRIDS["3-D"]).eval()
    x = factor * torch.randn(4, *model.grid.sample_shape, generator=generator)
    refined = ipr_fast.refine_batch(x, random_patches(0.5), 2, model=model, schedule=SCHEDULE)
    patches, before = model.grid.to_patches(refined), model.grid.to_patches(x)
    changed = (patches != before).any(-1)
    assert changed.any()
    torch.testing.assert_close(patches[changed], torch.full_like(patches[changed], factor), rtol=1e-5, atol=1e-6)
    assert torch.equal(patches[~changed], before[~changed])


def test_a_mask_of_another_grid_is_named(generator):
    model = AnyGrid(GRIDS["3-D"]).eval()
    x = torch.randn(4, *model.grid.sample_shape, generator=generator)
    with pytest.raises(ValueError, match=r"must have shape \(4, 8\) or \(4, 2, 2, 2\), got \(4, 4, 2\)"):
        ipr_fast.refine_batch(x, lambda x, iteration: torch.ones(4, 4, 2, dtype=torch.bool), 1, model=model)
    with pytest.raises(ValueError, match=r"^x must have 5 dimensions, got shape \(4, 1, 4, 24\)"):
        ipr_fast.refine_batch(x.flatten(-2).view(4, 1, 4, 24), random_patches(), 1, model=model)
    with pytest.raises(ValueError, match=r"^fixed_patches: the mask must have one of the shapes \(\(8,\), \(2, 2, 2\)"):
        ipr_fast.refine_batch(x, fixed_patches(torch.ones(9, dtype=torch.bool)), 1, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_numel": 7}, r"got samples \(1, 4, 4\), 2 patches of 7 numbers, a grid of \(2,\)"),
        ({"grid_shape": (2, 2)}, r"a grid of \(2, 2\)"),
        ({"num_patches": 2.0}, "grid.num_patches must be an int >= 1, got 2.0"),
        ({"sample_shape": 16}, "grid.sample_shape must be a sequence of ints >= 1, got 16"),
    ],
)
def test_a_grid_whose_numbers_disagree_is_refused(change, message):
    model = AnyGrid(Rings())
    model.grid = type("Grid", (Rings,), change)()
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        ipr_fast.generate_batch(1, model=model.eval())


def test_a_grid_without_a_name_is_refused():
    model = AnyGrid(Rings()).eval()
    model.grid = (4, 4)
    with pytest.raises(ValueError, match=r"with a `grid` \(PatchGrid\), got a tuple without sample_shape, grid_shape"):
        ipr_fast.generate_batch(1, model=model)
