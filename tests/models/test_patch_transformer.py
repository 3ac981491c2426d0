import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import TINY, randomise

import ipr_fast
from ipr_fast import ActivePatches, Prediction, Schedule
from ipr_fast.kernels.slot_inputs import slot_inputs
from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.sampling.prediction import LogitPrediction

READ_OUTS = {"linear": TINY, "clean": replace(TINY, output="clean"), "pixels": replace(TINY, pixel_width=5)}


@pytest.fixture(scope="module", params=READ_OUTS)
def model(request) -> PatchTransformer:
    return randomise(PatchTransformer(READ_OUTS[request.param]), seed=0)


def make_case(generator):
    patches = torch.randn(10, 16, 16, generator=generator)
    mask = torch.rand(10, 16, generator=generator) < torch.rand(10, 1, generator=generator)
    mask[0], mask[1] = False, True
    active = ActivePatches.from_mask(mask, slots=16)
    return patches, active, torch.rand(10, 16, generator=generator) * active.occupied


def assert_same_slots(ours, theirs, active):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[active.occupied], other[active.occupied], atol=1e-5, rtol=1e-5)


def test_cached_and_uncached_execution_agree(model, generator):
    patches, active, levels = make_case(generator)
    with torch.no_grad():
        uncached = model(patches, levels, active)
        cached = model(patches, levels, active, context=model.prepare(patches, active))
    assert_same_slots(cached, uncached, active)


def test_slots_that_the_engine_gathered_give_the_same_numbers_with_the_mix_as_a_logit(model, generator):
    patches, active, levels = make_case(generator)
    with torch.no_grad():
        table = model.tabulate(levels.flatten().unique())
        made = {"context": model.prepare(patches, active, table=table), "table": table}
        expected = model(patches, levels, active, **made)
        slots = slot_inputs(patches, active.index, levels, table.levels, model.slot_dtype)
        elsewhere = torch.full_like(patches, float("nan"))  # only the slots are read
        found = model(elsewhere, levels, active, **made, slots=slots)
    assert isinstance(found, LogitPrediction) == (model.config == READ_OUTS["linear"])
    found = found.finished() if isinstance(found, LogitPrediction) else found
    assert all(map(torch.equal, found, expected))


def test_a_context_serves_every_step_of_an_iteration_and_its_buffers_the_next(model, generator):
    patches, active, levels = make_case(generator)
    with torch.no_grad():
        context = model.prepare(patches, active)
        for _ in range(3):
            moved = torch.where(active.scatter(active.occupied, 16, fill=False)[..., None], patches + 1, patches)
            patches, levels = moved, levels / 2
            cached = model(patches, levels, active, context=context)
            assert_same_slots(cached, model(patches, levels, active), active)
        patches, active, levels = make_case(generator)
        context.keys_values.fill_(float("nan"))  # whatever the last iteration left
        context.slot.fill_(7)
        again = model.prepare(patches, active, out=context)
        assert again is context
        cached = model(patches, levels, active, context=again)
        assert_same_slots(cached, model(patches, levels, active), active)


def test_the_context_of_the_first_chains_is_theirs(model, generator):
    """As chains finish, the others go on with a part of the context; padding slots may write into the next chain's."""
    patches, active, levels = make_case(generator)
    with torch.no_grad():
        context = model.prepare(patches, active)
        expected = model(patches, levels, active)
        for chains in (10, 7, 1):
            few = active[:chains]
            found = model(patches[:chains], levels[:chains], few, context=context.first(chains))
            assert_same_slots(found, Prediction(*(field[:chains] for field in expected)), few)


@pytest.mark.parametrize("schedule", [Schedule(10, 0.8), Schedule(3, 0.0), Schedule(7, 0.55)], ids=str)
def test_a_table_of_levels_gives_what_the_levels_give(model, generator, schedule):
    patches, active, _ = make_case(generator)
    levels = schedule.levels(16)
    assert (levels.diff() > 0).all()
    some = levels[torch.randint(0, len(levels), active.index.shape, generator=generator)]
    with torch.no_grad():
        context = model.prepare(patches, active)
        table = model.tabulate(torch.cat([levels, levels[-1:].expand(3)]))
        found = model(patches, some, active, context=context, table=table)
        assert_same_slots(found, model(patches, some, active, context=context), active)
        model.tabulate(torch.zeros(len(table.levels)), out=table)
        again = model.tabulate(torch.cat([levels, levels[-1:].expand(3)]), out=table)
        assert again is table
        assert_same_slots(found, model(patches, some, active, context=context, table=table), active)


def test_a_table_has_what_the_context_needs(model, generator):
    patches, active, _ = make_case(generator)
    model, levels = copy.deepcopy(model), torch.linspace(0, 1, 16)
    with torch.no_grad():
        table = model.tabulate(levels)
        for shift in (0.0, 1.0):  # as after a step of training
            model.role.weight += shift
            model.tabulate(levels, out=table)
            contexts = model.prepare(patches, active, table=table), model.prepare(patches, active)
            torch.testing.assert_close(*(each.keys_values for each in contexts), atol=1e-5, rtol=1e-5)


def test_the_context_does_not_see_the_active_patches(model, generator):
    patches, _, _ = make_case(generator)
    is_active = torch.zeros(10, 16, dtype=torch.bool)
    is_active[:, 5:9] = True
    levels, changed = is_active * 0.5, patches.clone()
    changed[:, 6] += 1
    first, second = (model.predict(p, levels, is_active).velocity for p in (patches, changed))
    difference = (first - second).abs().amax(-1)
    assert (difference[:, :5] == 0).all()
    assert (difference[:, 9:] == 0).all()
    assert (difference[:, 5:9] > 1e-6).all()


def test_the_active_patches_see_everything(model, generator):
    patches, _, _ = make_case(generator)
    is_active = torch.zeros(10, 16, dtype=torch.bool)
    is_active[:, 5:9] = True
    base = model.predict(patches, is_active * 0.5, is_active).velocity
    for n in range(16):
        changed = patches.clone()
        changed[:, n] += 1
        moved = model.predict(changed, is_active * 0.5, is_active).velocity - base
        assert (moved[:, 5:9].abs().amax(-1) > 1e-6).all()


def test_levels_roles_and_positions_matter(model, generator):
    patches, _, _ = make_case(generator)
    none, one = torch.zeros(10, 16), torch.zeros(10, 16, dtype=torch.bool)
    one[:, 4] = True
    base = model.predict(patches, none, one)
    assert not torch.allclose(base.velocity[:, 4], model.predict(patches, none + one * 0.3, one).velocity[:, 4])
    assert not torch.allclose(base.velocity[:, 4], model.predict(patches, none, ~one).velocity[:, 4])
    same = model.predict(patches[:, :1].expand(-1, 16, -1), none, torch.ones_like(one)).velocity
    assert torch.unique(same[0].round(decimals=4), dim=0).shape[0] == 16


def test_without_active_patches_all_are_active(model, generator):
    patches, _, _ = make_case(generator)
    levels = torch.rand(10, 16, generator=generator)
    every = ActivePatches.from_mask(torch.ones(10, 16, dtype=torch.bool))
    with torch.no_grad():
        for ours, theirs in zip(model(patches, levels), model(patches, levels, every), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_weights_of_any_precision_run(model, generator, dtype, tolerance):
    """Half-precision outputs are near the float32 ones: some thirty roundings of numbers about 3 in size."""
    patches, active, levels = make_case(generator)
    other = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        exact = model(patches, levels, active).velocity[active.occupied]
        for context in (None, other.prepare(patches, active)):
            ours = other(patches, levels, active, context=context).velocity[active.occupied].float()
            assert (ours - exact).abs().max() < tolerance


def test_autocast_runs(model, generator):
    patches, active, levels = make_case(generator)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = model(patches, levels, active, context=model.prepare(patches, active))
    with torch.no_grad():
        exact = model(patches, levels, active)
    assert (lowered.velocity - exact.velocity)[active.occupied].abs().max() < 0.2


def test_outputs_have_their_shapes_and_ranges(model, generator):
    patches, active, levels = make_case(generator)
    prediction = model(patches, levels, active)
    assert prediction.velocity.shape == prediction.variance_mix.shape == (10, 16, 16)
    assert prediction.log_variance.shape == (10, 16)
    assert (prediction.variance_mix >= 0).all()
    assert (prediction.variance_mix <= 1).all()


def test_the_velocity_of_a_clean_output_leads_from_it_to_the_noisy_patch(generator):
    patches, levels = torch.randn(3, 16, 16, generator=generator), torch.rand(3, 16, generator=generator)
    levels[0], levels[1] = 0.0, 0.01  # below the floor of the division
    read, made = (randomise(PatchTransformer(READ_OUTS[name]), seed=0) for name in ("linear", "clean"))
    is_active = torch.ones(3, 16, dtype=torch.bool)
    with torch.no_grad():
        clean, mix, log_variance = read.predict(patches, levels, is_active)  # the same weights: the same numbers
        found = made.predict(patches, levels, is_active)
    expected = (patches - clean) / levels.clamp_min(0.05)[..., None]
    torch.testing.assert_close(found.velocity, expected)
    assert torch.equal(found.variance_mix, mix)
    assert torch.equal(found.log_variance, log_variance)
    assert made.half()(patches, levels).velocity.dtype == torch.float32


def test_a_wide_patch_needs_a_clean_output(generator):
    """Noise of 16 numbers does not pass through tokens of 8; that of a clean patch need not."""
    config = replace(TINY, width=8, num_heads=1)
    noise, level = torch.randn(512, 16, 16, generator=generator), torch.full((512, 16), 0.5)
    is_active, errors = torch.ones_like(level, dtype=torch.bool), {}
    for output in ("velocity", "clean"):
        torch.manual_seed(0)
        model = PatchTransformer(replace(config, output=output))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            error = (model.predict(0.5 * noise, level, is_active).velocity - noise).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        errors[output] = error.item()
    assert errors["clean"] < 0.01 < 0.4 < errors["velocity"]  # at least half of the variance of 1 is lost


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 33},
        {"depth": 0},
        {"num_heads": 2.0},
        {"box_size": 3},
        {"box_size": -2},
        {"level_features": 7},
        {"pixel_width": 0},
        {"pixel_width": True},
        {"pixel_width": 2000},
        {"output": "noise"},
        {"output": None},
        {"output": "clean", "pixel_width": 2},
        {"patch_size": 5},
        {"patch_size": 0, "box_size": 2},
        {"image_size": (16, 10)},
        {"image_size": (4, 16, 16), "box_size": 2},
        {"image_size": (16,), "box_size": 2},
        {"image_size": ()},
        {"patch_size": (4, 4, 4)},
        {"image_size": (4, 2048, 1024), "patch_size": (4, 2048, 1024), "pixel_width": 2},
        {"value_range": 1.0},
        {"value_range": (1.0, -1.0)},
        {"value_range": (0.0, float("inf"))},
        {"refine_schedule": (0, 0.5)},
        {"refine_schedule": (1, 0.5, 3)},
        {"generate_schedule": 3},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="must"):
        PatchTransformer(PatchTransformerConfig(**({"channels": 1, "image_size": 16, "patch_size": 4} | bad)))


# --------------------------------------------------------------------------------------------------------- other grids

SMALL = {"width": 24, "depth": 2, "num_heads": 2}
GRIDS = {
    "sequence": PatchTransformerConfig(2, (12,), 3, value_range=None, **SMALL),
    "image": PatchTransformerConfig(1, (4, 9), (2, 3), pixel_width=3, **SMALL),
    "video": PatchTransformerConfig(1, (4, 4, 6), (2, 2, 3), value_range=(-20.0, 30.0), **SMALL),
}


@pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)
def test_it_takes_any_grid(config, generator):
    model = randomise(PatchTransformer(config), seed=0)
    count, numel = model.grid.num_patches, model.grid.patch_numel
    patches, mask = torch.randn(6, count, numel, generator=generator), torch.rand(6, count, generator=generator) < 0.5
    active = ActivePatches.from_mask(mask)
    levels = torch.rand(active.index.shape, generator=generator) * active.occupied
    with torch.no_grad():
        cached = model(patches, levels, active, context=model.prepare(patches, active))
        assert_same_slots(cached, model(patches, levels, active), active)
    assert cached.velocity.shape == (6, count, numel)


def test_a_place_is_the_sum_of_its_axes():
    position = PatchTransformer(GRIDS["video"]).position
    names, tables = zip(*position.named_parameters(), strict=True)
    assert names == ("frames", "rows", "columns")
    place = torch.cartesian_prod(*(torch.arange(len(table)) for table in tables))
    expected = sum((table[i] for table, i in zip(tables[1:], place.T[1:], strict=True)), tables[0][place[:, 0]])
    assert torch.equal(position(torch.arange(len(place))), expected)
    assert [name for name, _ in PatchTransformer(GRIDS["sequence"]).position.named_parameters()] == ["columns"]


def test_rows_columns_and_boxes_are_added_as_they_always_were():
    position = PatchTransformer(replace(TINY, image_size=(16, 24))).position
    assert [name for name, _ in position.named_parameters()] == ["rows", "columns", "boxes"]
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    expected = (position.rows[:, None] + position.columns) + position.boxes[row // 2 * 3 + column // 2]
    assert torch.equal(position(torch.arange(24)), expected.flatten(0, 1))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (((16, 16), (4, 4)), (16, 4)),
        (([16, 24], [4, 4]), ((16, 24), 4)),
        (((16,), (4,)), ((16,), 4)),
        (((16, 16, 16), (1, 4, 4)), ((16, 16, 16), (1, 4, 4))),
    ],
)
def test_sizes_are_kept_in_their_shortest_form(given, kept):
    """So that files of square images are as they were, and equal configurations are equal."""
    config = PatchTransformerConfig(1, *given)
    assert (config.image_size, config.patch_size) == kept
    assert config == PatchTransformerConfig(1, *kept)
    assert PatchTransformerConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_the_grids_in_the_readme_run(capsys):
    text = (Path(ipr_fast.__file__).parent / "models" / "README.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "latents" in block)
    exec(compile(block, "models/README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "PatchGrid.of((2, 256), (8,)) (2, 2, 256)",
        "PatchGrid.of((4, 8, 16, 24), (2, 4, 4)) (2, 4, 8, 16, 24)",
        "PatchGrid.of((3, 32, 64), (4, 8)) (2, 3, 32, 64)",
    ]
