"""Files of the published implementation and of spatialreasoners: what loads, and what their shapes tell."""

from dataclasses import asdict, replace

import pytest
import torch
from published_files import (
    OF_LIBRARY,
    TINY,
    UNTOLD,
    assert_weights,
    lightning,
    made,
    spatialreasoners_names,
    srm_names,
    variant,
)
from recordings import DATA, config_of
from safetensors.torch import load_file

from ipr_fast import generate_batch, load_model, random_patches, refine_batch, save_model
from ipr_fast.models import PRESETS, SRMUNet
from ipr_fast.models.files.checkpoints import model_info


def test_the_recorded_checkpoint_gives_its_average():
    raw = torch.load(DATA / "tiny_gray.ckpt", weights_only=True)["state_dict"]
    model = load_model(DATA / "tiny_gray.ckpt", config=config_of("tiny_gray"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, raw[f"ema_denoiser.module.{name}"])
        assert not torch.equal(tensor, raw[f"denoiser.{name}"])
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.encoder.blocks[1][0].conv_1[2].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [TINY, UNTOLD, asdict(TINY)], ids=["config", "what is not told", "dict"])
def test_shapes_tell_the_rest(unet, tmp_path, config):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    model = load_model(str(path), config=config)
    assert model.config == TINY
    assert_weights(model, unet)


@pytest.mark.parametrize("layout", ["srm", "spatialreasoners"])
@pytest.mark.parametrize("average", ["taken", "never taken", "none"])
def test_both_layouts_and_the_average_before_the_plain_weights(unet, tmp_path, layout, average):
    names, base = (srm_names, "") if layout == "srm" else (spatialreasoners_names, "denoising_model.")
    state = names(made(TINY, 1), f"{base}denoiser.")
    if average != "none":
        state |= names(unet, f"{base}ema_denoiser.module.")
        state[f"{base}ema_denoiser.n_averaged"] = torch.tensor(5 if average == "taken" else 0)
    model = load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD if layout == "srm" else OF_LIBRARY)
    assert_weights(model, unet if average == "taken" else made(TINY, 1))


@pytest.mark.parametrize("prefix", ["", "denoiser.", "denoising_model.denoiser."])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_plain_state_dicts_load(unet, tmp_path, prefix, suffix):
    torch.save(spatialreasoners_names(unet, prefix), tmp_path / f"x{suffix}")
    model = load_model(tmp_path / f"x{suffix}", config=OF_LIBRARY)
    assert model.config == replace(TINY, mix="raw")
    assert_weights(model, unet)


def test_what_a_file_of_spatialreasoners_does_not_tell_is_asked_for_by_name(unet, tmp_path):
    torch.save(spatialreasoners_names(unet, "denoiser."), tmp_path / "x.pt")
    for absent in OF_LIBRARY:
        given = {name: value for name, value in OF_LIBRARY.items() if name != absent}
        with pytest.raises(ValueError, match=rf"does not tell {absent}: pass config="):
            load_model(tmp_path / "x.pt", config=given)
    others = {"activation": "relu", "flow": "cosine", "parameterization": "eps", "variance": "fixed_small"}
    for name, value in others.items():
        message = rf"{name} is '.*' in an SRMUNet, config says '{value}'; .*SpatialReasonersDenoiser"
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "x.pt", config=OF_LIBRARY | {name: value})
    with pytest.raises(ValueError, match="its weights have mix raw, config says halved"):
        load_model(tmp_path / "x.pt", config=TINY)
    with pytest.raises(ValueError, match="config must be an SRMUNetConfig or a dict for"):
        load_model(tmp_path / "x.pt", config="even_pixels")
    other = load_model(tmp_path / "x.pt", config=OF_LIBRARY | {"level_scale": 10, "level_shift": 0.5})
    save_model(other, tmp_path / "y.safetensors")
    assert load_model(tmp_path / "y.safetensors").config == replace(TINY, mix="raw", level_scale=10, level_shift=0.5)


def test_bare_safetensors_load():
    model = load_model(DATA / "tiny_rgb.weights.safetensors", config=UNTOLD)
    assert model.config == replace(TINY, channels=3)
    for name, tensor in load_file(DATA / "tiny_rgb.weights.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_saved_as_safetensors_it_needs_no_config(unet, tmp_path):
    unet = made(replace(TINY, refine_schedule=(4, 0.5)), 2)
    save_model(unet, tmp_path / "x.safetensors")
    model = load_model(tmp_path / "x.safetensors")
    assert model.config == unet.config
    assert model.refine_schedule.steps_per_patch == 4
    assert_weights(model, unet)


def test_a_preset_is_recognised_but_not_assumed(tmp_path):
    with torch.device("meta"):
        weights = SRMUNet(PRESETS["even_pixels"]).state_dict()
    path = lightning(tmp_path / "x.ckpt", {name: torch.zeros_like(t, device="cpu") for name, t in weights.items()})
    with pytest.raises(ValueError, match="its shapes match 'even_pixels'"):
        load_model(path)
    model = load_model(path, config="even_pixels")
    assert model.config == PRESETS["even_pixels"]
    assert all(p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters())
    assert model_info(path)["parameters"] == 19_718_791


def test_what_a_file_tells_is_printed_without_a_config(unet, tmp_path):
    info = model_info(lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser.")))
    assert info["architecture"] == "SRMUNet"
    assert info["sample_shape"] is None
    assert info["parameters"] == sum(p.numel() for p in unet.parameters())
    assert info["metadata"]["hid_dims"] == "(32, 64)"
    assert info["metadata"]["weights"] == "denoiser"


def test_a_loaded_model_owns_its_weights(unet, tmp_path):
    """Neither a change of the file nor of another weight reaches it."""
    path = tmp_path / "x.safetensors"
    save_model(unet, path)
    model = load_model(path)
    path.write_bytes(b"\0" * 100)
    assert_weights(model, unet)
    state, shared = srm_names(unet, "denoiser."), torch.zeros(32)
    tied = {name: shared if t.shape == (32,) and "norm.bias" in name else t for name, t in state.items()}
    model = load_model(lightning(tmp_path / "x.ckpt", tied), config=UNTOLD)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    save_model(model, path)


@pytest.mark.parametrize("device", ["cuda:99", "xyz", "meta", 3.5])
def test_a_device_that_cannot_be_used_is_refused_first(device):
    with pytest.raises(ValueError, match=r"device .* cannot be used"):
        load_model("no such file", device=device)


def test_loading_leaves_torchs_random_numbers_alone(unet, tmp_path):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    load_model(path, config=UNTOLD)
    load_model("digit-sudoku-4x4")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_of_a_compiled_network_load(unet, tmp_path):
    state = {name.replace("denoiser.", "denoiser._orig_mod."): t for name, t in srm_names(unet, "denoiser.").items()}
    assert_weights(load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD), unet)


@pytest.mark.parametrize("name", ["last", "x.CKPT", "model.pt.old"])
def test_the_kind_of_a_file_is_told_by_its_contents(unet, tmp_path, name):
    assert_weights(load_model(lightning(tmp_path / name, srm_names(unet, "denoiser.")), config=UNTOLD), unet)
    save_model(unet, tmp_path / name)
    assert_weights(load_model(tmp_path / name), unet)


def test_mixed_types_load_as_one(unet, tmp_path):
    path = lightning(tmp_path / "x.ckpt", variant(srm_names(unet, "denoiser."), "mixed"))
    assert {p.dtype for p in load_model(path, config=UNTOLD, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["even_pixels", "mnist_sudoku"])
def test_the_full_published_schedule_runs_from_a_lightning_file(tmp_path, name):
    """Iterations with the paper's settings, on its grid of patches; the network and the patches are small."""
    preset = PRESETS[name]
    grid = preset.image_size // preset.patch_size
    small = {"image_size": 2 * grid, "patch_size": 2, "num_head_channels": 32, "t_emb_dim": 32, "d_emb": 16}
    network = {"hid_dims": (32, 32), "attention": (False, False), "num_blocks": 1}
    config = replace(preset, **small, **network)
    path = lightning(tmp_path / "x.ckpt", srm_names(made(config, 3), "ema_denoiser.module."))
    schedules = {"generate_schedule": config.generate_schedule, "refine_schedule": config.refine_schedule}
    model = load_model(path, config=small | schedules)
    assert model.config == config
    x = generate_batch(1, model=model)
    seen = []
    refined = refine_batch(x, random_patches(0.25), 10, model=model, callback=lambda i, _: seen.append(i))
    assert seen == list(range(1, 11))
    assert refined.isfinite().all()
    assert not torch.equal(refined, x)
