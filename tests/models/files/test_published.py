"""Checkpoints of the published networks: what is taken from them, what is asked for, and what is refused."""

import io
import json
import pickle
import random
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import DATA, config_of
from safetensors.torch import load_file, save_file

from ipr_fast import generate_batch, load_model, random_patches, refine_batch, save_model
from ipr_fast.models import PRESETS, SRMUNet, SRMUNetConfig
from ipr_fast.models.files.checkpoints import model_info

TINY = SRMUNetConfig(1, 16, 4, (32, 64), (False, True), num_blocks=1, num_head_channels=32, t_emb_dim=32, d_emb=16)
UNTOLD = {"image_size": 16, "patch_size": 4, "num_head_channels": 32}


@pytest.fixture(scope="module")
def unet() -> SRMUNet:
    return made(TINY, 0)


def made(config, seed):
    torch.manual_seed(seed)
    return SRMUNet(config).eval().requires_grad_(False)


def srm_names(model, prefix):
    """A network's weights as Lightning saves them, the embedding repeated in every block."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[prefix + name] = tensor.clone()
        if name.endswith("norm_with_embedding.norm.weight"):
            for shared, repeated in model.time_embedding.state_dict().items():
                state[f"{prefix}{name.removesuffix('norm.weight')}t_emb.{shared}"] = repeated.clone()
    return state


def spatialreasoners_names(model, prefix):
    state = {}
    for name, tensor in srm_names(model, "").items():
        state[prefix + name.removeprefix("model.").replace("time_embedding.", "t_emb.")] = tensor
    return state


def lightning(path, state):
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": state, "optimizer_states": [], "callbacks": {}}, path)
    return path


def assert_weights(model, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


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
    model = load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    assert_weights(model, unet if average == "taken" else made(TINY, 1))


@pytest.mark.parametrize("prefix", ["", "denoiser.", "denoising_model.denoiser."])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_plain_state_dicts_load(unet, tmp_path, prefix, suffix):
    torch.save(spatialreasoners_names(unet, prefix), tmp_path / f"x{suffix}")
    assert_weights(load_model(tmp_path / f"x{suffix}", config=UNTOLD), unet)


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


def test_what_is_not_told_is_asked_for(unet, tmp_path):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    with pytest.raises(ValueError, match=r"x\.ckpt: cannot infer image_size, patch_size, num_head_channels"):
        load_model(path)
    with pytest.raises(ValueError, match=r"cannot infer patch_size, num_head_channels: .*\(its shapes match none\)"):
        load_model(path, config={"image_size": 16})


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sudoku", r"config must be a preset \(even_pixels, counting_polygons, mnist_sudoku\).*got 'sudoku'"),
        (3, "config must be an SRMUNetConfig, a preset's name or a dict, got int"),
        (UNTOLD | {"colour": 1, 2: 3}, r"config: \['colour', 2\] are not fields of SRMUNetConfig"),
        (UNTOLD | {"channels": torch.ones(2)}, "channels must be a positive int"),
        (UNTOLD | {"hid_dims": np.array([32, 64])}, "hid_dims must be a tuple"),
        (UNTOLD | {"image_size": "16"}, "image_size must be a positive int"),
        (UNTOLD | {"channels": 3}, r"x\.ckpt: its weights have channels 1, config says 3"),
        (UNTOLD | {"patch_size": 5}, "patch_size must divide"),
        (UNTOLD | {"num_head_channels": 48}, "num_head_channels must divide"),
        ("mnist_sudoku", r"x\.ckpt: .*weight 'denoiser\.model\.bottleneck.*has shape \(64,\), expected \(512,\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(unet, tmp_path, config, message):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    with pytest.raises(ValueError, match=message):
        load_model(path, config=config)


def test_what_a_file_tells_is_printed_without_a_config(unet, tmp_path):
    info = model_info(lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser.")))
    assert info["architecture"] == "SRMUNet"
    assert info["sample_shape"] is None
    assert info["parameters"] == sum(p.numel() for p in unet.parameters())
    assert info["metadata"]["hid_dims"] == "(32, 64)"
    assert info["metadata"]["weights"] == "denoiser"


def variant(state, kind):
    """A state dict of a network that spatialreasoners can build and SRMUNet is not; or with one thing wrong."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    conv_in, conv_out = "denoiser.model.encoder.blocks.0.0.weight", "denoiser.model.decoder.out.2.weight"
    a_block = "denoiser.model.encoder.blocks.1.0.norm_with_embedding"
    if kind == "labels":
        state["denoiser.class_embedding.weight"] = torch.zeros(10, 32)
    elif kind == "no bottleneck":
        state = {name: tensor for name, tensor in state.items() if "bottleneck" not in name}
    elif kind == "concat_mask":
        state[conv_in] = torch.zeros(32, 3, 3, 3)
    elif kind == "no variance":
        state[conv_out] = state[conv_out][:2]
    elif kind == "scale shift":
        name = "denoiser.model.bottleneck.blocks.0.norm_with_embedding.embedding_layer.1.weight"
        state[name] = torch.cat([state[name]] * 2)
    elif kind == "embeddings differ":
        state[f"{a_block}.t_emb.mlp.2.bias"] += 1
    elif kind == "embedding missing":
        state = {name: tensor for name, tensor in state.items() if "time_embedding" not in name}
    elif kind == "uneven blocks":
        del state["denoiser.model.encoder.blocks.3.0.conv_1.2.weight"]
    elif kind == "missing":
        del state[f"{a_block}.norm.bias"]
    elif kind == "extra":
        state["denoiser.model.encoder.blocks.1.0.gate"] = torch.zeros(2, 3)
    elif kind == "integers":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].int()
    elif kind == "sparse":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].to_sparse()
    elif kind == "meta":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].to("meta")
    elif kind == "mixed":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].half()
    elif kind == "transformer":
        state = {"denoising_model.denoiser.blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("labels", "is conditioned on labels"),
        ("no bottleneck", "has no bottleneck"),
        (
            "concat_mask",
            r"has 3 channels in and 3 out: either it takes the mask .*\(concat_mask\), or it predicts no variance",
        ),
        ("no variance", "puts out 2 channels for 1 of image; .* 3"),
        ("scale shift", "scales and shifts by its level embedding"),
        (
            "embeddings differ",
            r"weight 'denoiser\.model\.encoder.*\.t_emb\.mlp\.2\.bias' is not equal to 'denoiser\.time",
        ),
        ("embedding missing", r"is not equal to 'denoiser\.time_embedding"),
        ("uneven blocks", "the ResBlocks of its encoder, as .* are"),
        (
            "missing",
            r"no weight 'denoiser\.model\.encoder\.blocks\.1.*norm\.bias', expected shape \(32,\)",
        ),
        ("extra", r"unexpected weight 'denoiser\.model\.encoder\.blocks\.1\.0\.gate' of shape \(2, 3\)"),
        ("integers", r"norm\.bias' is of torch\.int32, expected one of float16"),
        ("sparse", r"norm\.bias' is not a dense tensor \(torch\.sparse_coo, torch\.float32, cpu\)"),
        ("meta", r"norm\.bias' is not a dense tensor \(torch\.strided, torch\.float32, meta\)"),
        ("mixed", r"its weights are of several types, .*: pass dtype="),
        ("transformer", r"nor a published SRM UNet: no weights named .* but 'denoising_model\.denoiser\.blocks\.0"),
    ],
)
def test_what_is_no_srm_unet_is_refused_with_the_reason(unet, tmp_path, kind, message):
    path = lightning(tmp_path / "x.ckpt", variant(srm_names(unet, "denoiser."), kind))
    with pytest.raises(ValueError, match=r"x\.ckpt: .*" + message):
        load_model(path, config=UNTOLD)


def test_errors_name_the_weight_as_the_file_does(unet, tmp_path):
    state = spatialreasoners_names(unet, "denoising_model.denoiser.")
    del state["denoising_model.denoiser.t_emb.mlp.2.bias"]
    for name in [name for name in state if name.endswith("norm_with_embedding.t_emb.mlp.2.bias")]:
        del state[name]
    with pytest.raises(ValueError, match=r"no weight 'denoising_model\.denoiser\.t_emb\.mlp\.2\.bias', expected shape"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    state = spatialreasoners_names(unet, "denoising_model.denoiser.")
    state["denoising_model.denoiser.encoder.blocks.1.0.conv_1.0.bias"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"'denoising_model\.denoiser\.encoder\.blocks\.1.* has shape \(5,\), expected \(32"
    ):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


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


def test_more_than_the_file_holds_is_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    state["denoiser.model.encoder.blocks.0.0.bias"] = torch.zeros(1).expand(32)
    with pytest.raises(ValueError, match=r"x\.ckpt: .*claims 32 numbers, the file holds 1 of them"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


@pytest.mark.parametrize(
    "change", [{"num_blocks": 10**9}, {"hid_dims": [32] * 3000}, {"t_emb_dim": 2**62}, {"channels": 2**70}, "[" * 10**5]
)
def test_an_absurd_configuration_in_a_file_takes_neither_time_nor_memory(unet, tmp_path, change):
    config = change if isinstance(change, str) else json.dumps(unet.config.to_dict() | change)
    metadata = {"format": "pt", "architecture": "SRMUNet", "config": config}
    save_file(
        {name: t.clone().contiguous() for name, t in unet.state_dict().items()}, tmp_path / "x.safetensors", metadata
    )
    for function in (load_model, model_info):
        with pytest.raises(ValueError, match=r"x\.safetensors: its configuration is not one of SRMUNet"):
            function(tmp_path / "x.safetensors")


def test_two_weights_of_one_name_are_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.") | {"denoiser.encoder.blocks.0.0.bias": torch.ones(32)}
    with pytest.raises(ValueError, match=r"unexpected weight 'denoiser\.encoder\.blocks\.0\.0\.bias'"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    state = spatialreasoners_names(unet, "denoiser.") | {"denoiser.model.decoder.out.0.bias": torch.ones(32)}
    with pytest.raises(ValueError, match="are the same one of a network"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    state = srm_names(unet, "denoiser.") | {"denoiser.zzz.norm_with_embedding.t_emb.mlp.0.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"unexpected weight 'denoiser\.zzz"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


def test_a_moving_average_is_never_passed_over_in_silence(unet, tmp_path):
    state = srm_names(made(TINY, 1), "denoiser.") | srm_names(unet, "ema_denoiser.")
    assert_weights(load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD), unet)
    average = srm_names(unet, "ema_denoiser.module.") | {"ema_denoiser.n_averaged": torch.tensor(9)}
    partly = {name: tensor for name, tensor in average.items() if "encoder.blocks" not in name}
    state = srm_names(made(TINY, 1), "denoiser.") | partly
    with pytest.raises(ValueError, match=r"x\.ckpt: its moving average \(ema_denoiser\.\*\) holds no encoder"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


def test_attributes_on_a_files_tensors_do_nothing(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    odd = torch.nn.Parameter(state["denoiser.model.encoder.blocks.0.0.bias"])
    odd.contiguous, odd.numel, odd.clone = "x", "y", "z"
    state["denoiser.model.encoder.blocks.0.0.bias"] = odd
    assert_weights(load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD), unet)


def test_a_weight_that_a_type_cannot_hold_is_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    state["denoiser.model.encoder.blocks.0.0.bias"][3] = 1e5
    path = lightning(tmp_path / "x.ckpt", state)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.bias' is up to 100000, more than torch\.float16 can hold"):
        load_model(path, config=UNTOLD, dtype=torch.float16)
    load_model(path, config=UNTOLD, dtype=torch.bfloat16)


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


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["beside", "inside", "bare pickle", "legacy"])
def test_code_in_a_file_is_never_run(unet, tmp_path, how):
    trap, path = Malicious(tmp_path / "it ran"), tmp_path / "x.ckpt"
    state = srm_names(unet, "denoiser.")
    if how == "beside":
        torch.save({"state_dict": state, "hyper_parameters": trap}, path)
    elif how == "inside":
        torch.save({"state_dict": state | {"denoiser.model.encoder.blocks.0.0.weight": trap}}, path)
    elif how == "bare pickle":
        path.write_bytes(pickle.dumps({"state_dict": trap}))
    else:
        torch.save({"state_dict": state, "x": trap}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"x\.ckpt: (holds an object of io\.open beside its weights|not a readable)"):
        load_model(path, config=UNTOLD)
    assert not (tmp_path / "it ran").exists()


FILES_WITH_OBJECTS = {
    "a checkpoint": lambda unet, weights: {"state_dict": weights, "hyper_parameters": Path("x")},
    "a module": lambda unet, weights: unet,
    "a module in a dict": lambda unet, weights: {"model": unet, "epoch": 3},
    "a module of another name": lambda unet, weights: {"optimizer": torch.optim.SGD(unet.parameters()), "net": unet},
    "weights in a dict": lambda unet, weights: {"model": weights, "hyper_parameters": Path("x")},
    "an object among weights": lambda unet, weights: weights | {"hyper_parameters": Path("x")},
}


@pytest.mark.parametrize("kind", FILES_WITH_OBJECTS)
def test_the_advice_for_a_file_with_objects_works(unet, tmp_path, kind):
    path, new_path = tmp_path / "x.pt", tmp_path / "new.pt"
    torch.save(FILES_WITH_OBJECTS[kind](unet, srm_names(unet, "denoiser.")), path)
    with pytest.raises(ValueError, match=r"holds an object of .* beside its weights") as refused:
        load_model(path, config=UNTOLD)
    code = str(refused.value).split("keep the weights alone: ")[1]
    exec(code, {"torch": torch, "path": path, "new_path": new_path})
    again = load_model(new_path, config=UNTOLD)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in unet.state_dict().items())


def test_other_contents_are_refused(tmp_path):
    for contents, message in {
        "list": ([1, 2], "holds no state dict, but an object of type list"),
        "empty": ({}, r"holds no state dict; its keys are \[\]"),
        "no tensors": ({"state_dict": {"a": 1}}, r"holds no state dict; its keys are \['a'\]"),
        "other": ({"weight": torch.zeros(3)}, "nor a published SRM UNet: .* but 'weight'"),
    }.values():
        torch.save(contents, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x\.pt: .*" + message):
            load_model(tmp_path / "x.pt")


def documented(path, data):
    """Loading these bytes gives a model, or the documented error, which names the file: then None."""
    path.write_bytes(data)
    try:
        return load_model(path, config=UNTOLD)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


@pytest.mark.parametrize("form", [".ckpt", ".safetensors", "legacy.ckpt"])
def test_a_file_cut_at_any_byte_is_refused(unet, tmp_path, form):
    path = tmp_path / f"x{form}"
    if form == ".safetensors":
        save_model(unet, path)
    else:
        state = {"state_dict": srm_names(unet, "denoiser.")}
        torch.save(state, path, _use_new_zipfile_serialization=form == ".ckpt")
    whole = path.read_bytes()
    lengths = {*range(0, 300, 7), *range(len(whole) - 60, len(whole)), *range(0, len(whole), len(whole) // 50)}
    for length in sorted(lengths):
        assert documented(path, whole[:length]) is None, length


def test_a_file_with_wrong_bytes_gives_a_model_or_the_documented_error(unet, tmp_path):
    rng = random.Random(0)
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        if suffix == ".ckpt":
            lightning(path, srm_names(unet, "denoiser."))
        else:
            save_model(unet, path)
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                # Half of them in the header or, in a zip, the table of contents and the pickle.
                end = len(whole) if rng.random() < 0.5 else 20_000
                data[rng.randrange(end) if rng.random() < 0.5 else -rng.randrange(1, end)] = rng.randrange(256)
            documented(path, bytes(data))


def test_a_pickle_with_wrong_bytes_runs_nothing(unet, tmp_path):
    """The pickle of a whole zip file, changed before it is packed, so that no checksum protects the loader."""
    path, rng = tmp_path / "x.ckpt", random.Random(1)
    lightning(path, srm_names(unet, "denoiser."))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))
    for _ in range(150):
        data = bytearray(entries[pickled])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for name, content in (entries | {pickled: bytes(data)}).items():
                archive.writestr(name, content)
        documented(path, packed.getvalue())


def test_renamed_and_reshaped_weights_are_named(unet, tmp_path):
    rng, good = random.Random(2), srm_names(unet, "denoiser.")
    for _ in range(60):
        state, name = dict(good), rng.choice(sorted(good))
        change = rng.choice(["rename", "drop", "flatten", "transpose", "grow", "scalar", "empty"])
        tensor = state.pop(name)
        if change == "rename":
            state[name[: rng.randrange(1, len(name))] + rng.choice(["", "x", ".0", "é"])] = tensor
        elif change != "drop":
            state[name] = {
                "flatten": lambda t: t.flatten()[None],
                "transpose": lambda t: t[None].transpose(0, -1),
                "grow": lambda t: torch.cat([t, t]),
                "scalar": lambda t: t.flatten()[0].clone(),
                "empty": lambda t: t[:0].clone(),
            }[change](tensor)
        path = lightning(tmp_path / "x.ckpt", state)
        if (change == "rename" and set(state) == set(good)) or ".t_emb." in name:
            documented(path, path.read_bytes())  # a repeated embedding may be missing
            continue
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_model(path, config=UNTOLD)


@pytest.mark.parametrize("name", ["even_pixels", "mnist_sudoku"])
def test_the_full_published_schedule_runs_from_a_lightning_file(tmp_path, name):
    """50 iterations with the paper's settings, on its grid of patches; the network and the patches are small."""
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
    refined = refine_batch(x, random_patches(0.25), model=model, callback=lambda iteration, _: seen.append(iteration))
    assert seen == list(range(1, 51))
    assert refined.isfinite().all()
    assert not torch.equal(refined, x)
