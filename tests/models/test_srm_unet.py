"""The published UNet: its recorded outputs, its size, its arithmetic, and the ways to call it."""

from dataclasses import replace

import pytest
import torch
from baselines.per_pixel import PerPixelUNet
from recordings import config_of, model_of, read
from torch.utils.flop_counter import FlopCounterMode

from ipr_fast import ActivePatches, Denoiser, Schedule, generate_batch, random_patches, refine_batch
from ipr_fast.models import PRESETS, SRMUNet, SRMUNetConfig
from ipr_fast.models.unet import ResBlock

PARAMETERS = {"even_pixels": 19_718_791, "counting_polygons": 76_765_191, "mnist_sudoku": 118_994_691}
MOST_GFLOP = {"even_pixels": 3.5, "counting_polygons": 128, "mnist_sudoku": 500}
GFLOP = {"even_pixels": 3.474, "counting_polygons": 126.38, "mnist_sudoku": 487.15}
PER_PIXEL_GFLOP = {"even_pixels": 9.2, "counting_polygons": 226, "mnist_sudoku": 876}
# Grids of 3x3 patches whose maps are finer than the patches, as fine, and coarser, with odd sizes among them.
AWKWARD = SRMUNetConfig(1, 21, 7, (32, 64, 32, 32), (False, True, False, True), 1, 32, 32, 16)

ROUNDING = 1e-5  # of the largest value: float32 through a whole forward pass, summed in another order


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=ROUNDING * expected.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def unet() -> SRMUNet:
    return randomised(AWKWARD)


def randomised(config: SRMUNetConfig, seed: int = 0) -> SRMUNet:
    torch.manual_seed(seed)
    return SRMUNet(config).eval().requires_grad_(False)


def make_state(config, generator, batch=5):
    model_grid = SRMUNet(config).grid
    patches = torch.randn(batch, model_grid.num_patches, model_grid.patch_numel, generator=generator)
    mask = torch.rand(batch, model_grid.num_patches, generator=generator) < 0.4
    mask[0], mask[1] = False, True
    return patches, mask, torch.rand(mask.shape, generator=generator) * mask


@pytest.mark.parametrize("name", ["tiny_gray", "tiny_rgb"])
def test_its_output_is_the_recorded_one(name):
    model, (recorded, _) = model_of(name), read(f"{name}.forward")
    patches = model.grid.to_patches(recorded["z"])
    prediction = model(patches, recorded["t"])
    found = {
        "raw": model.raw(recorded["z"], recorded["t"]),
        "velocity": model.grid.to_images(prediction.velocity),
        "v": model.grid.to_images(prediction.variance_mix),
        "sigma": (0.5 * prediction.log_variance).exp(),
    }
    for key, value in found.items():
        assert_same(value, recorded[key])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size_and_a_fraction_of_the_arithmetic(name):
    with torch.device("meta"):
        model = SRMUNet(PRESETS[name]).eval()
        patches = torch.empty(1, model.grid.num_patches, model.grid.patch_numel)
        levels = torch.empty(1, model.grid.num_patches)
        gflop = {}
        for key, denoiser in {"ours": model, "per pixel": PerPixelUNet(model)}.items():
            with FlopCounterMode(display=False) as counter:
                denoiser(patches, levels)
            gflop[key] = counter.get_total_flops() / 1e9
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert gflop["ours"] <= MOST_GFLOP[name]
    assert gflop["ours"] == pytest.approx(GFLOP[name], rel=1e-3)
    assert gflop["per pixel"] == pytest.approx(PER_PIXEL_GFLOP[name], rel=0.01)


SHAPES = [
    AWKWARD,
    config_of("tiny_rgb"),
    replace(AWKWARD, image_size=20, patch_size=20),
    # 41 pixels: where a nearest-neighbour resampling by float32 scale takes the wrong patch at a border.
    # Neither images nor patches are square; a map has whole patches along one side, along both, or along none.
    replace(AWKWARD, image_size=(16, 24), patch_size=(4, 8)),
    replace(AWKWARD, image_size=(30, 21), patch_size=(5, 7)),
    replace(AWKWARD, image_size=82, patch_size=41, hid_dims=(32, 32, 32), attention=(False,) * 3),
]


@pytest.mark.parametrize("config", SHAPES)
def test_it_equals_the_formula_for_every_pixel(config, generator):
    model = randomised(config)
    patches, _, levels = make_state(config, generator)
    found, expected = model(patches, levels), PerPixelUNet(model)(patches, levels)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_active_slots_are_predicted_as_all_patches_are(unet, generator):
    patches, mask, levels = make_state(AWKWARD, generator)
    everything = unet(patches, levels)
    for slots in (9, int(mask.sum(1).max())):
        active = ActivePatches.from_mask(mask, slots)
        found = unet(patches, active.gather(levels), active)
        for ours, theirs in zip(found, everything.at(active), strict=True):
            assert ours.shape == theirs.shape
            assert_same(ours[active.occupied], theirs[active.occupied])


def test_levels_of_padding_slots_do_not_matter(unet, generator):
    patches, mask, levels = make_state(AWKWARD, generator)
    active = ActivePatches.from_mask(mask)
    levels = active.gather(levels)
    found = unet(patches, levels, active)
    other = unet(patches, torch.where(active.occupied, levels, 0.7), active)
    for ours, theirs in zip(found, other, strict=True):
        assert torch.equal(ours[active.occupied], theirs[active.occupied])


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_batch_in_parts_is_the_same_batch(unet, generator, at_once, monkeypatch):
    patches, mask, levels = make_state(AWKWARD, generator)
    active = ActivePatches.from_mask(mask)
    whole = [unet(patches, levels), unet(patches, active.gather(levels), active)]
    monkeypatch.setattr(SRMUNet, "cpu_bytes", at_once * 4 * AWKWARD.map_numel)
    sizes, predict = [], unet._predict

    def spy(patches, *rest):
        sizes.append(len(patches))
        return predict(patches, *rest)

    monkeypatch.setattr(unet, "_predict", spy)
    parts = [unet(patches, levels), unet(patches, active.gather(levels), active)]
    assert max(sizes) == at_once
    assert sum(sizes) == 2 * len(patches)
    for one, other in zip(whole, parts, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)


def test_one_sample_at_a_time_where_one_is_more_than_the_bound():
    with torch.device("meta"):
        model = SRMUNet(PRESETS["mnist_sudoku"])
    assert model._samples_at_once(torch.device("cpu")) == 1


@pytest.mark.parametrize(
    ("preset", "most"), [("even_pixels", 10_922), ("counting_polygons", 511), ("mnist_sudoku", 132)]
)
def test_on_a_gpu_32_bits_count_the_numbers_of_every_map(preset, most):
    """The maps of one sample, as the network makes them: none is wider than said, and one is."""
    numbers = []
    with torch.device("meta"):
        model = SRMUNet(PRESETS[preset])
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, inputs, out: numbers.extend(t.numel() for t in (*inputs, out)))
        stages = model.model.decoder.blocks
        for stage in stages:
            stage.register_forward_pre_hook(lambda _, inputs: numbers.append(inputs[0].numel()))
        model(torch.zeros(1, model.grid.num_patches, model.grid.patch_numel), torch.zeros(1, model.grid.num_patches))
    assert max(numbers) == model.config.widest_numel
    assert model._samples_at_once(torch.device("cuda")) == most


def test_an_empty_batch_is_legal(unet):
    prediction = unet(torch.zeros(0, 9, 49), torch.zeros(0, 9))
    assert [tuple(field.shape) for field in prediction] == [(0, 9, 49), (0, 9, 49), (0, 9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_near(unet, generator, dtype):
    patches, _, levels = make_state(AWKWARD, generator)
    low = randomised(AWKWARD).to(dtype)
    low.load_state_dict(unet.state_dict())
    # Some forty roundings of half an eps, as a random walk; measured: up to 2 eps of the largest value.
    for ours, theirs in zip(low(patches, levels), unet(patches, levels), strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - theirs).abs().max() < 4 * torch.finfo(dtype).eps * theirs.abs().max()


def test_gradients_reach_every_parameter(generator):
    model = randomised(AWKWARD).requires_grad_(True)
    patches, _, levels = make_state(AWKWARD, generator)
    prediction = model(patches, levels)
    sum(field.square().sum() for field in prediction).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_is_a_denoiser_with_the_papers_schedules(unet):
    assert isinstance(unet, Denoiser)
    schedules = {name: (config.generate_schedule, config.refine_schedule) for name, config in PRESETS.items()}
    assert schedules == {
        "mnist_sudoku": ((3, 0.0), (10, 0.8)),
        "counting_polygons": ((10, 0.9), (10, 0.9)),
        "even_pixels": ((30, 0.9), (30, 0.9)),
    }
    model = randomised(replace(AWKWARD, generate_schedule=(1, 0.5), refine_schedule=(2, 0.5)))
    x = generate_batch(3, model=model, seed=1)
    for backend in ("torch", "reference"):
        refined = refine_batch(x, random_patches(0.3), 2, model=model, seed=1, backend=backend)
        explicit = refine_batch(
            x, random_patches(0.3), 2, model=model, seed=1, backend=backend, schedule=model.refine_schedule
        )
        assert torch.equal(refined, explicit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 20}, "patch_size must divide"),
        ({"channels": 0}, "channels must be a positive int"),
        ({"hid_dims": (32, 48, 32, 32)}, "hid_dims must be multiples of 32"),
        ({"hid_dims": ()}, "hid_dims must be of 1 to 20 resolutions, got 0"),
        ({"hid_dims": (32,) * 3000}, "hid_dims must be of 1 to 20 resolutions, got 3000"),
        ({"num_blocks": 10**9}, "num_blocks must be a positive int of at most 64"),
        ({"t_emb_dim": 2**62}, "t_emb_dim must be a positive int of at most 1048576"),
        ({"image_size": 0}, "image_size must be a positive int"),
        ({"image_size": 2**20, "patch_size": 1}, "patch_size: must give at most 65536 patches"),
        ({"image_size": (21, 20)}, "^patch_size must divide the spatial sizes 21 x 20 of samples, got 7"),
        ({"patch_size": (7, 3, 1)}, "^patch_size must be an int or 2 of them"),
        ({"image_size": (21,)}, r"^image_size must be an int or \(height, width\) for an SRMUNet, .* got \(21,\)"),
        ({"image_size": (7, 21, 21)}, r"^image_size must be an int or \(height, width\) for an SRMUNet"),
        ({"image_size": (7, 7, 7, 7)}, "^image_size must be an int or one to three of them"),
        ({"hid_dims": 32}, "hid_dims must be a tuple"),
        ({"attention": (True,)}, "attention must be 4 bools"),
        ({"attention": (0, 1, 0, 1)}, "attention must be 4 bools"),
        ({"num_head_channels": 48}, "num_head_channels must divide"),
        ({"d_emb": 15}, "d_emb must be even"),
        ({"num_blocks": 1.0}, "num_blocks must be a positive int"),
        ({"refine_schedule": (3,)}, r"refine_schedule must be \(steps_per_patch, overlap\)"),
        ({"refine_schedule": (3, 2.0)}, "overlap must be a finite number"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(AWKWARD, **change)


@pytest.mark.parametrize("schedule", [Schedule(10, 0.8), Schedule(4, 1.0)], ids=str)
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_table_of_levels_gives_what_the_levels_give(unet, generator, schedule, in_parts, monkeypatch):
    patches, mask, _ = make_state(AWKWARD, generator)
    active, levels = ActivePatches.from_mask(mask), schedule.levels(9)
    if in_parts:
        monkeypatch.setattr(SRMUNet, "cpu_bytes", 2 * 4 * unet.config.map_numel)
    table = unet.tabulate(torch.cat([levels, levels[-1:].expand(3)]))
    with torch.no_grad():
        for slots in (active, None):
            some = levels[torch.randint(0, len(levels), mask.shape, generator=generator)]
            expected, found = unet(patches, some, slots), unet(patches, some, slots, table=table)
            for ours, theirs in zip(found, expected, strict=True):
                used = slice(None) if slots is None else slots.occupied
                assert_same(ours[used], theirs[used])
    unet.tabulate(torch.zeros(len(table.levels)), out=table)
    assert unet.tabulate(torch.cat([levels, levels[-1:].expand(3)]), out=table) is table
    torch.testing.assert_close(table.embeddings[: len(levels)], unet.time_embedding(levels))
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    for block, rows in table.projected.items():
        torch.testing.assert_close(rows, block.project(table.embeddings))
    assert len(table.projected) == len(blocks)


def test_a_table_saves_the_projections_of_levels_by_patch(unet, generator, monkeypatch):
    """Of the maps of 21, 11, 6 and 3 pixels, for 3 patches, that of 11 alone has levels by pixel."""
    patches, mask, _ = make_state(AWKWARD, generator)
    active, levels = ActivePatches.from_mask(mask), torch.linspace(0, 1, 5)
    table, calls, project = unet.tabulate(levels), [], ResBlock.project
    monkeypatch.setattr(ResBlock, "project", lambda block, rows: calls.append(len(rows)) or project(block, rows))
    with torch.no_grad():
        unet(patches, levels[torch.randint(0, 5, active.index.shape, generator=generator)], active, table=table)
    assert set(calls) == {5 * 11 * 11}
