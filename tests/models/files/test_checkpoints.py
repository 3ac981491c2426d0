import copy
import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from full_disk import full_disk
from safetensors import safe_open
from safetensors.torch import load, save_file
from small_models import PIXELS, randomise
from unclosed import unclosed

import ipr_fast
from ipr_fast.models import PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig
from ipr_fast.models.files.checkpoints import bundled_model_for, load_model, model_info, save_model
from ipr_fast.models.files.weight_files import safetensors_bytes

MOST_BYTES = 4_000_000


def test_a_saved_model_comes_back(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(model, path, note="for a test")
    again = load_model(path)
    assert again.config == model.config
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert model_info(path)["metadata"]["note"] == "for a test"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pixel_head_comes_back(tmp_path, dtype):
    model, path = randomise(PatchTransformer(PIXELS), seed=0).to(dtype), tmp_path / "model.safetensors"
    save_model(model, path)
    again = load_model(path)
    assert again.config == PIXELS
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "config",
    [
        PatchTransformerConfig(2, (12,), 3, width=16, depth=1, num_heads=1, value_range=None),
        PatchTransformerConfig(1, (4, 4, 6), (2, 2, 3), width=16, depth=1, num_heads=1, value_range=(-20, 30)),
        SRMUNetConfig(1, (8, 16), (4, 8), (32,), (False,), 1, 32, 32, 16),
    ],
    ids=["sequence", "video", "unet"],
)
def test_a_model_of_another_grid_comes_back_with_it(config, tmp_path):
    path = tmp_path / "model.safetensors"
    model = SRMUNet(config) if isinstance(config, SRMUNetConfig) else PatchTransformer(config)
    save_model(model, path)
    again, info = load_model(path), model_info(path)
    assert (again.config, again.grid, again.value_range) == (config, model.grid, model.value_range)
    assert info["sample_shape"] == config.grid.sample_shape
    x = ipr_fast.generate_batch(1, model=again, schedule=ipr_fast.Schedule(1, 1.0))
    assert x.shape == (1, *info["sample_shape"])


def test_a_file_with_a_linear_read_out_says_nothing_of_pixels(model, tmp_path):
    """As files were before there was a pixel head, to the byte."""
    save_model(model, tmp_path / "model.safetensors")
    fields = json.loads(model_info(tmp_path / "model.safetensors")["metadata"]["config"])
    assert list(fields) == [
        *("channels", "image_size", "patch_size", "width", "depth", "num_heads", "mlp_ratio", "box_size"),
        *("level_features", "generate_schedule", "refine_schedule"),
    ]


def test_dtype_and_explicit_configuration(model, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file(dict(model.state_dict()), path)
    again = load_model(str(path), config=model.config, dtype=torch.float64)
    assert {p.dtype for p in again.parameters()} == {torch.float64}


def test_bundled_models_load_are_small_and_have_a_card():
    for name in ipr_fast.bundled_models():
        model, info = load_model(name), model_info(name)
        assert model.config.sample_shape == info["sample_shape"]
        assert bundled_model_for(info["sample_shape"]) == name
        path = info["path"]
        with open(path, "rb") as file:
            assert len(file.read()) <= MOST_BYTES
        with open(path.replace(".safetensors", ".md")) as card:
            text = card.read()
        for word in ("Data", "Command", "Seed", "Measured"):
            assert word in text
    assert "digit-sudoku-4x4" in ipr_fast.bundled_models()


def bad_files(model):
    config = json.dumps(model.config.to_dict())
    good = {"architecture": "PatchTransformer", "config": config}
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    missing = {k: v for k, v in tensors.items() if k != "patch_in.bias"}
    return {
        "no metadata": (tensors, None, "neither a file with the configuration of an SRMUNet in its metadata, nor"),
        "foreign": (tensors, good | {"architecture": "ResNet"}, "hold no configuration"),
        "no JSON": (tensors, good | {"config": "{"}, "its configuration is not one of PatchTransformer"),
        "wrong field": (tensors, good | {"config": '{"colour": 3}'}, "its configuration is not one of"),
        "missing": (missing, good, r"no weight 'patch_in.bias', expected shape \(32,\)"),
        "extra": (tensors | {"more": torch.zeros(2)}, good, r"unexpected weight 'more' of shape \(2,\)"),
        "shape": (
            tensors | {"patch_in.bias": torch.zeros(3)},
            good,
            r"has shape \(3,\), expected \(32,\)",
        ),
    }


@pytest.mark.parametrize("case", ["no metadata", "foreign", "no JSON", "wrong field", "missing", "extra", "shape"])
def test_a_bad_file_is_named_with_what_is_wrong(model, tmp_path, case):
    tensors, metadata, message = bad_files(model)[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
        load_model(path)


def test_integer_weights_are_refused(model, tmp_path):
    metadata = {"architecture": "PatchTransformer", "config": json.dumps(model.config.to_dict())}
    tensors = {name: t.to(torch.int32) for name, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "int.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"is of torch\.int32, expected one of float16, bfloat16"):
        load_model(tmp_path / "int.safetensors")


def test_truncated_files_are_refused(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: not a readable safetensors file"):
            load_model(cut)


def test_an_unknown_name_lists_what_is_bundled():
    with pytest.raises(ValueError, match=r"digit-sudoku-4x4.*got 'nothing'"):
        load_model("nothing")


def test_wrong_config_and_dtype_are_refused(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config must be one of"):
        load_model(tmp_path / "model.safetensors", config={"width": 3})
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        load_model(tmp_path / "model.safetensors", dtype=torch.int8)


def test_save_model_refuses_what_it_could_not_read_again(model, tmp_path):
    for bad in ({"config": "y"}, {"architecture": "z"}, {"steps": 3}):
        with pytest.raises(ValueError, match="metadata must be strings, under other names"):
            save_model(model, tmp_path / "x.safetensors", **bad)
    with pytest.raises(ValueError, match=r"model must be one of .* got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(IsADirectoryError):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(model, tmp_path):
    path = tmp_path / "x.safetensors"
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: .*x\.safetensors"):
        save_model(model, path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_earlier_file_whole(model, tmp_path):
    path = tmp_path / "x.safetensors"
    save_model(model, path, note="the earlier one")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        save_model(model, path)
    assert model_info(path)["metadata"]["note"] == "the earlier one"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_schedules_of_numpy_numbers_are_saved(model, tmp_path):
    config = dataclasses.replace(model.config, refine_schedule=(np.int64(4), np.float32(0.5)))
    odd = ipr_fast.models.PatchTransformer(config)
    save_model(odd, tmp_path / "x.safetensors")
    assert load_model(tmp_path / "x.safetensors").config.refine_schedule == (4, 0.5)


def test_equal_weights_give_equal_bytes(model, tmp_path):
    """Of weights whose types make the header's length odd as well."""
    notes = {f"note {i}": "é" * i for i in range(12)}
    written = set()
    for _ in range(8):
        save_model(model, tmp_path / "x.safetensors", **notes)
        written.add((tmp_path / "x.safetensors").read_bytes())
    assert len(written) == 1
    data = written.pop()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {name: file.metadata()[name] for name in notes} == notes
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in model.state_dict().items())


def test_the_header_is_padded_whatever_its_length():
    for length in range(9):
        data = safetensors_bytes({"a": torch.arange(3.0), "b": torch.ones(1, dtype=torch.float16)}, {"x": "y" * length})
        assert int.from_bytes(data[:8], "little") % 8 == 0
        assert load(data)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("part", ["all of it", "its layers"])
def test_a_compiled_model_is_saved_as_the_original(model, tmp_path, part):
    compiled = copy.deepcopy(model)
    if part == "all of it":
        compiled = torch.compile(compiled)
    else:
        for i, layer in enumerate(compiled.layers):
            compiled.layers[i] = torch.compile(layer)
    assert any("_orig_mod." in name for name in compiled.state_dict())
    save_model(compiled, tmp_path / "compiled.safetensors")
    save_model(model, tmp_path / "plain.safetensors")
    assert (tmp_path / "compiled.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_info_tells_the_stored_types(model, tmp_path):
    save_model(copy.deepcopy(model).half(), tmp_path / "half.safetensors")
    assert model_info(tmp_path / "half.safetensors")["dtype"] == "float16"
    mixed = copy.deepcopy(model)
    mixed.patch_in.to(torch.bfloat16)
    save_model(mixed, tmp_path / "mixed.safetensors")
    assert model_info(tmp_path / "mixed.safetensors")["dtype"] == "bfloat16, float32"


@pytest.mark.parametrize("form", [".safetensors", ".pt", ".ckpt"])
def test_loading_leaves_no_file_open(tmp_path, monkeypatch, form):
    config = ipr_fast.models.SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)
    model, path = ipr_fast.models.SRMUNet(config), tmp_path / f"x{form}"
    if form == ".safetensors":
        save_model(model, path)
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    whole = path.read_bytes()
    with unclosed(monkeypatch) as found:
        for length in (len(whole), len(whole) - 1, len(whole) // 2, 100, 0):
            path.write_bytes(whole[:length])
            with suppress(ValueError):
                load_model(path, config=config)
    assert found == []
