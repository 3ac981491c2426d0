"""Sequences, wide images and video of latents on the command line: generate, refine, pictures, info."""

import numpy as np
import PIL.Image
import pytest
from command_line import failed_in_one_line, run
from small_models import randomise

from ipr_fast.cli.main import main
from ipr_fast.models import PatchTransformer, PatchTransformerConfig
from ipr_fast.models.files.checkpoints import save_model

LAYERS = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 0.5), "refine_schedule": (2, 0.5)}
MODELS = {
    "sequence": PatchTransformerConfig(1, (12,), 3, value_range=None, **LAYERS),
    "channels": PatchTransformerConfig(2, (12,), 3, value_range=None, **LAYERS),
    "wide": PatchTransformerConfig(1, (4, 9), (2, 3), value_range=(-4, 4), **LAYERS),
    "video": PatchTransformerConfig(1, (4, 4, 6), (2, 2, 3), value_range=None, **LAYERS),
}


@pytest.fixture(params=MODELS)
def made(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = MODELS[request.param]
    save_model(randomise(PatchTransformer(config), seed=0), "model.safetensors")
    return config


def test_samples_of_any_grid_are_generated_and_refined(made, capsys):
    shape, grid = made.sample_shape, made.grid
    known = np.zeros((3, *grid.grid_shape), dtype=bool)
    known[:, 0] = True
    values = 5 * np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    np.save("known.npy", known)
    np.save("values.npy", values[:, 0] if made.channels == 1 else values)  # one channel may be left out
    options = ["--model", "model.safetensors", "--known", "known.npy"]
    run("generate", *options, "--known-values", "values.npy", "--count", 3, "--out", "x.npy")
    x = np.load("x.npy")
    run("refine", "x.npy", *options, "--iters", 2, "--out", "refined.npy")
    refined = np.load("refined.npy")
    assert x.shape == refined.shape == (3, *shape)
    first = (slice(None), slice(None), slice(made.grid.patch_shape[0]))
    assert np.array_equal(x[first], values[first])
    assert np.array_equal(refined[first], values[first])
    assert not np.array_equal(x, refined)
    if made.channels == 1:
        np.save("flat.npy", x[:, 0])
        run("refine", "flat.npy", *options, "--iters", 2, "--out", "again.npy")
        assert np.array_equal(np.load("again.npy"), refined)
    capsys.readouterr()
    run("refine", "x.npy", *options, "--iters", 2, "--out", "pictures")
    told = capsys.readouterr().out
    pictures = [np.array(PIL.Image.open(f"pictures/{i:04d}.png")) for i in range(3)]
    low, high = (refined.min(), refined.max()) if made.value_range is None else made.value_range
    kind = "plots" if len(shape) == 2 else "pictures"
    assert told == f"wrote 3 refined samples as {kind} of numbers from {low:.4g} to {high:.4g} to pictures\n"
    if len(shape) != 2:
        expected = np.clip((refined - low) / (high - low), 0, 1) * 255
        frames = expected[:, 0] if len(shape) == 4 else expected
        for picture, sample in zip(pictures, frames, strict=True):
            for i, frame in enumerate(sample):
                assert np.abs(picture[:, i * (frame.shape[1] + 1) :][:, : frame.shape[1]] - frame).max() <= 0.51


def test_info_says_what_a_sample_and_a_patch_are(made, capsys):
    assert main(["info", "model.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"sample_shape  {made.sample_shape}" in lines
    assert f"patch_shape   {made.grid.patch_shape}" in lines


def test_samples_of_another_grid_are_refused(made, capsys):
    np.save("x.npy", np.zeros((3, 5, 7, 9), dtype=np.float32))
    assert main(["refine", "x.npy", "--model", "model.safetensors", "--iters", "1", "--out", "y.npy"]) == 1
    assert failed_in_one_line(capsys, "refine", "the input must have", "got", "(3, 5, 7, 9)")
