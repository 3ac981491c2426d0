"""ipr-fast convert, and info of a checkpoint."""

import json

import pytest
import torch

import ipr_fast
from ipr_fast.cli.main import main
from ipr_fast.files import read_samples


def make_checkpoint(path):
    """A small SRM UNet of 16x16 samples in Lightning's format."""
    config = ipr_fast.models.SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)
    model = ipr_fast.models.SRMUNet(config).eval()
    torch.save({"state_dict": {f"ema_denoiser.module.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


SIZES = ["--image-size", "16", "--patch-size", "4", "--num-head-channels", "32"]


def test_a_converted_checkpoint_is_a_model_like_any_other(tmp_path, capsys):
    model, out = make_checkpoint(tmp_path / "x.ckpt"), tmp_path / "new" / "x.safetensors"
    schedules = ["--generate-schedule", "2", "0.5", "--refine-schedule", "3", "0.5"]
    assert main(["convert", str(tmp_path / "x.ckpt"), str(out), *SIZES, *schedules]) == 0
    again = ipr_fast.load_model(out)
    assert again.refine_schedule == ipr_fast.Schedule(3, 0.5)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert main(["info", str(out)]) == 0
    assert "x.ckpt" in capsys.readouterr().out
    samples, refined = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
    assert main(["generate", "--model", str(out), "--count", "2", "--out", samples, "--quiet"]) == 0
    options = ["--iters", "2", "--noise", "fixed", "--fixed-region", "--quiet"]
    assert main(["refine", samples, "--model", str(out), "--out", refined, *options]) == 0
    expected = ipr_fast.refine_batch(
        read_samples(samples).images, ipr_fast.random_patches(fixed=True), 2, model=again, noise="fixed"
    )
    assert torch.equal(read_samples(refined).images, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "cannot infer image_size, patch_size, num_head_channels"),
        (["--image-size", "16x"], "--image-size must be a side, 28, or height and width, 28x32, got '16x'"),
        (["--patch-size", "0"], "--patch-size must be a side"),
        (["--preset", "mnist_sudoku"], "has shape (32,), expected (512,)"),
        (
            ["--preset", "mnist_sudoku", *SIZES],
            "--preset already sets image_size, patch_size, num_head_channels",
        ),
        ([*SIZES, "--refine-schedule", "3", "2"], "--refine-schedule: overlap must be a finite number in [0, 1]"),
    ],
)
def test_convert_says_what_it_needs(tmp_path, capsys, options, message):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["convert", str(tmp_path / "x.ckpt"), str(tmp_path / "x.safetensors"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_convert_writes_safetensors_only(tmp_path, capsys):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["convert", str(tmp_path / "x.ckpt"), str(tmp_path / "x.pt"), *SIZES]) == 1
    assert "x.pt: must end in .safetensors" in capsys.readouterr().err


def test_info_of_a_checkpoint_says_what_its_shapes_tell(tmp_path, capsys):
    make_checkpoint(tmp_path / "x.ckpt")
    assert main(["info", str(tmp_path / "x.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "sample_shape  not in the file" in out
    assert "hid_dims      (32, 32)" in out


def test_what_a_file_says_is_printed_as_one_line(tmp_path, capsys):
    torch.save({"a\nb\x1b[31m": torch.zeros(2)}, tmp_path / "x.ckpt")
    assert main(["info", str(tmp_path / "x.ckpt")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    model = make_checkpoint(tmp_path / "y.ckpt")
    ipr_fast.save_model(model, tmp_path / "y.safetensors", note="\x1b[2J\nparameters    0")
    assert main(["info", str(tmp_path / "y.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\nparameters ") == 1


def test_convert_keeps_what_a_file_says_of_itself(tmp_path):
    assert main(["convert", "digit-sudoku-4x4", str(tmp_path / "x.safetensors"), "--dtype", "bfloat16"]) == 0
    before, after = (
        ipr_fast.models.files.checkpoints.model_info(s) for s in ("digit-sudoku-4x4", tmp_path / "x.safetensors")
    )
    for key in set(before["metadata"]) - {"source", "config"}:
        assert after["metadata"][key] == before["metadata"][key]
    assert json.loads(after["metadata"]["config"]) == json.loads(before["metadata"]["config"])


def test_convert_writes_the_same_bytes_each_time(tmp_path):
    make_checkpoint(tmp_path / "x.ckpt")
    written = set()
    for i in range(3):
        out = tmp_path / f"{i}.safetensors"
        assert main(["convert", str(tmp_path / "x.ckpt"), str(out), *SIZES]) == 0
        written.add(out.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("options", [["--preset", "even_pixels"], ["--image-size", "64"]])
def test_what_a_file_says_of_its_sizes_cannot_be_changed(options, tmp_path, capsys):
    assert main(["convert", "digit-sudoku-4x4", str(tmp_path / "x.safetensors"), *options]) == 1
    assert f"error: {options[0]}: for checkpoints of an SRM UNet; digit-sudoku-4x4 has" in capsys.readouterr().err


def test_a_file_is_not_converted_onto_itself(tmp_path, capsys, model):
    path = tmp_path / "x.safetensors"
    ipr_fast.save_model(model, path)
    assert main(["convert", str(path), str(path)]) == 1
    assert "is the source; give another output file" in capsys.readouterr().err
