"""Files with code, damaged bytes or absurd claims: nothing runs, and the documented error comes."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from published_files import (
    UNTOLD,
    assert_weights,
    documented,
    lightning,
    srm_names,
)
from safetensors.torch import save_file

from ipr_fast import load_model, save_model
from ipr_fast.models.files.checkpoints import model_info


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


def test_attributes_on_a_files_tensors_do_nothing(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    odd = torch.nn.Parameter(state["denoiser.model.encoder.blocks.0.0.bias"])
    odd.contiguous, odd.numel, odd.clone = "x", "y", "z"
    state["denoiser.model.encoder.blocks.0.0.bias"] = odd
    assert_weights(load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD), unet)


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
