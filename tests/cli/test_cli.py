"""generate, refine and info, run in this process: what they write and say."""

import re

import numpy as np
import torch
from command_line import run

import ipr_fast
from ipr_fast.cli.main import main
from ipr_fast.files import read_samples


def test_generate_and_refine_are_the_library_calls(tmp_path, weights, capsys):
    generated, refined = tmp_path / "a.npy", tmp_path / "b.npz"
    assert main(["generate", "--model", weights, "--count", "5", "--seed", "3", "--out", str(generated)]) == 0
    options = ["--iters", "2", "--ratio", "0.5", "--schedule", "4", "0.5", "--seed", "3", "--quiet"]
    assert main(["refine", str(generated), "--model", weights, "--out", str(refined), *options]) == 0
    model = ipr_fast.load_model(weights)
    x = ipr_fast.generate_batch(5, model=model, seed=3)
    assert torch.equal(read_samples(generated).images, x)
    schedule, policy = ipr_fast.Schedule(4, 0.5), ipr_fast.random_patches(0.5)
    assert torch.equal(
        read_samples(refined).images, ipr_fast.refine_batch(x, policy, 2, model=model, schedule=schedule, seed=3)
    )
    captured = capsys.readouterr()
    assert "wrote 5 samples" in captured.out
    assert "generate" in captured.err  # the bar
    assert "refine" not in captured.err  # --quiet


def test_shards_are_the_parts_of_the_whole(tmp_path, weights):
    options = ["--model", weights, "--seed", 3]
    run("generate", "--count", 16, "--out", tmp_path / "all.npy", *options)
    run("refine", tmp_path / "all.npy", "--iters", 2, "--out", tmp_path / "all-refined.npy", *options)
    for first in (0, 8):
        part, refined = tmp_path / f"{first}.npy", tmp_path / f"{first}-refined.npy"
        shard = [*options, "--first-chain", first]
        run("generate", "--count", 8, "--out", part, *shard)
        run("refine", part, "--iters", 2, "--out", refined, *shard)
    for kind in ("", "-refined"):
        shards = torch.cat([read_samples(tmp_path / f"{first}{kind}.npy").images for first in (0, 8)])
        torch.testing.assert_close(shards, read_samples(tmp_path / f"all{kind}.npy").images, atol=1e-5, rtol=0)


def test_known_patches_stay(tmp_path, weights):
    known, values = np.zeros((2, 4, 4), dtype=bool), np.random.default_rng(0).normal(size=(2, 1, 16, 16))
    known[:, 1, 2] = True
    np.save(tmp_path / "known.npy", known)
    np.save(tmp_path / "values.npy", values.astype(np.float32))
    arguments = ["--known", str(tmp_path / "known.npy"), "--model", weights, "--quiet"]
    out, again = tmp_path / "out.pt", tmp_path / "again.pt"
    command = ["generate", "--count", "2", "--known-values", str(tmp_path / "values.npy"), "--out", str(out)]
    assert main([*command, *arguments]) == 0
    assert main(["refine", str(out), "--iters", "2", "--out", str(again), *arguments]) == 0
    for path in (out, again):
        cell = read_samples(path).images[:, :, 4:8, 8:12]
        assert np.array_equal(cell.numpy(), values.astype(np.float32)[:, :, 4:8, 8:12])


def test_folders_of_png(tmp_path, weights):
    pictures, refined = tmp_path / "pictures", tmp_path / "refined"
    assert main(["generate", "--model", weights, "--count", "3", "--out", str(pictures), "--quiet"]) == 0
    assert main(["refine", str(pictures), "--model", weights, "--iters", "1", "--out", str(refined), "--quiet"]) == 0
    assert sorted(p.name for p in refined.iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_refined_pictures_keep_their_16_bits(tmp_path, weights):
    from PIL import Image

    (tmp_path / "deep").mkdir()
    grey = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep" / "x.png")
    np.save(tmp_path / "known.npy", np.arange(16)[None] < 12)
    arguments = ["--known", str(tmp_path / "known.npy"), "--model", weights, "--iters", "1", "--quiet"]
    assert main(["refine", str(tmp_path / "deep"), "--out", str(tmp_path / "refined_0.25"), *arguments]) == 0
    with Image.open(tmp_path / "refined_0.25" / "x.png") as image:
        again = np.array(image)
    assert again.dtype == np.uint16
    assert np.array_equal(again[:12], grey[:12])
    assert not np.array_equal(again[12:], grey[12:])


def test_a_sweep_renoises_every_patch_once(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def darkness(x): return -x.flatten(1).mean(1)")
    monkeypatch.syspath_prepend(tmp_path)
    x, known = torch.rand(3, 1, 16, 16) * 2 - 1, torch.zeros(3, 16, dtype=torch.bool)
    known[0, :3], known[1, :], known[2, 5] = True, True, True  # 13 free patches, none, 15: sweeps of 5, 0 and 5
    np.save("x.npy", x)
    np.save("known.npy", known)
    arguments = ["refine", "x.npy", "--model", weights, "--iters", "5", "--sweep", "--known", "known.npy", "--quiet"]
    assert main([*arguments, "--out", "y.npy"]) == 0
    model = ipr_fast.load_model(weights)
    expected = ipr_fast.refine_batch(x, ipr_fast.sweep_patches(), 5, model=model, known=known)
    y = torch.from_numpy(np.load("y.npy"))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)
    changed = (model.grid.to_patches(y) != model.grid.to_patches(x)).any(-1)
    assert torch.equal(changed, ~known)
    capsys.readouterr()
    assert main([*arguments, "--out", "z.npy", "--schedule", "2", "1", "--accept", "mine:darkness"]) == 0
    assert f"{2 * 10 / 3:.1f} model calls a sample" in capsys.readouterr().out
    assert main([*arguments, "--out", "z.npy", "--schedule", "2", "0", "--accept", "mine:darkness"]) == 0
    told = f"{5 * 2 * (3 + 3) / 3:.1f} model calls a sample"  # a small block takes as many as others
    assert told in capsys.readouterr().out
    assert main([*arguments, "--out", "z.npy", "--fixed-region"]) == 1
    assert "--sweep and --fixed-region exclude each other" in capsys.readouterr().err


def test_info_tells_versions_and_models(capsys, weights):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert re.search(r"digit-sudoku-4x4 +PatchTransformer, samples \(1, 32, 32\)", said)
    assert main(["info", weights]) == 0
    said = capsys.readouterr().out
    assert "sample_shape  (1, 16, 16)" in said
    assert "dtype         float32" in said
