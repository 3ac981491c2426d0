"""Refinement in chunks: a run that was interrupted, killed or out of disk goes on to the result of one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from full_disk import full_disk

import ipr_fast
from ipr_fast.cli import chunks
from ipr_fast.cli.main import main
from ipr_fast.files import read_array, read_samples
from ipr_fast.outputs import alone_in

SAMPLES, CHUNK, ITERS = 10, 4, 5


@pytest.fixture
def weights(tmp_path, model):
    path = tmp_path / "tiny.safetensors"
    ipr_fast.save_model(model, path)
    return path


@pytest.fixture
def samples(tmp_path):
    """Ten samples of 16x16, as a file."""
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (SAMPLES, 1, 16, 16)).astype(np.float32))
    return path


def refine(samples, weights, out, *options):
    """The command's exit code. An option given here comes after, and so instead of, the usual one."""
    usual = ["--model", weights, "--out", out, "--iters", ITERS, "--schedule", 2, 0.5, "--chunk", CHUNK, "--quiet"]
    return main([str(argument) for argument in ["refine", samples, *usual, *options]])


@pytest.fixture
def expected(tmp_path, samples, weights):
    """The samples of a run that was not interrupted."""
    assert refine(samples, weights, tmp_path / "expected.npy") == 0
    return read_array(tmp_path / "expected.npy", "x")


@pytest.fixture
def stop(monkeypatch):
    """A function that has a chunk end after an iteration, as by Ctrl-C or another error; with None, no more."""
    real, at = chunks.refine_batch, {}

    def refine_batch(x, mask_fn, iters, *, callback=None, **options):
        chunk = int(options["chain_ids"][0]) // CHUNK

        def then_stop(iteration, images):
            callback(iteration, images)
            if at.get("chunk") == chunk and at["iteration"] == iteration:
                raise at["error"]

        return real(x, mask_fn, iters, callback=callback and then_stop, **options)

    def stop(chunk, iteration=0, error=KeyboardInterrupt):
        at.update(chunk=chunk, iteration=iteration, error=error)

    monkeypatch.setattr(chunks, "refine_batch", refine_batch)
    return stop


def test_chunks_are_the_parts_of_one_call(samples, weights, expected, model):
    whole = ipr_fast.refine_batch(
        read_samples(samples).images,
        ipr_fast.random_patches(),
        ITERS,
        model=model,
        schedule=ipr_fast.Schedule(2, 0.5),
    )
    torch.testing.assert_close(expected, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("chunk", "iteration"), [(0, 1), (0, ITERS), (1, 3), (2, ITERS)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, samples, weights, expected, stop, capsys, chunk, iteration):
    out = tmp_path / "out.npy"
    stop(chunk, iteration)
    assert refine(samples, weights, out) == 130
    done = chunk + (iteration == ITERS)
    part = "" if iteration == ITERS else f", another up to iteration {iteration} of {ITERS}"
    said = f"interrupted ({done} of 3 chunks done{part}; kept in {out}.partial, --resume goes on)"
    assert capsys.readouterr().err == f"ipr-fast refine: {said}\n"
    assert not out.exists()
    stop(None)
    assert refine(samples, weights, out, "--resume") == 0
    assert torch.equal(read_array(out, "x"), expected)
    assert not (tmp_path / "out.npy.partial").exists()


def test_what_is_saved_is_not_run_again(tmp_path, samples, weights, stop, monkeypatch):
    out, ran = tmp_path / "out.npy", []
    stop(1, 3)
    assert refine(samples, weights, out) == 130
    stop(None)
    real = chunks.refine_batch
    monkeypatch.setattr(
        chunks, "refine_batch", lambda x, mask_fn, iters, **o: ran.append(iters) or real(x, mask_fn, iters, **o)
    )
    assert refine(samples, weights, out, "--resume") == 0
    assert [iters for iters in ran if iters] == [ITERS - 3, ITERS]


def test_interrupts_may_come_again_and_again(tmp_path, samples, weights, expected, stop):
    out = tmp_path / "out.npy"
    for stops in ((0, 1), (0, 2), (1, 4), (2, 1), (2, 5)):
        stop(*stops)
        assert refine(samples, weights, out, "--resume") == 130
    stop(None)
    assert refine(samples, weights, out, "--resume") == 0
    assert torch.equal(read_array(out, "x"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_goes_on_in_float32_and_keeps_its_bits(tmp_path, weights, model, stop, dtype):
    x, known = torch.rand(SAMPLES, 1, 16, 16, dtype=torch.float64).mul(2).sub(1).to(dtype), torch.arange(16) < 8
    torch.save(x, tmp_path / "x.pt")
    np.save(tmp_path / "known.npy", known.expand(SAMPLES, 16).numpy())
    options = ["--known", tmp_path / "known.npy", "--first-chain", 4, "--first-iteration", 7]
    assert refine(tmp_path / "x.pt", weights, tmp_path / "expected.pt", *options) == 0
    stop(2, 9)  # the second chunk: its chain ids begin with 8
    assert refine(tmp_path / "x.pt", weights, tmp_path / "out.pt", *options) == 130
    stop(None)
    assert refine(tmp_path / "x.pt", weights, tmp_path / "out.pt", *options, "--resume") == 0
    refined = read_array(tmp_path / "out.pt", "x")
    assert refined.dtype == dtype
    assert torch.equal(refined, read_array(tmp_path / "expected.pt", "x"))
    assert torch.equal(refined[:, :, :8], x[:, :, :8])
    assert not torch.equal(refined[:, :, 8:], x[:, :, 8:])
    chains = {"chain_ids": torch.arange(4, 4 + SAMPLES), "known": known.expand(SAMPLES, 16), "first_iteration": 7}
    schedule = ipr_fast.Schedule(2, 0.5)
    whole = ipr_fast.refine_batch(x, ipr_fast.random_patches(), ITERS, model=model, schedule=schedule, **chains)
    torch.testing.assert_close(refined.double(), whole.double(), atol=4 * torch.finfo(dtype).eps + 1e-5, rtol=0)


def test_pictures_go_on_too(tmp_path, samples, weights, stop):
    stop(1, 2)
    assert refine(samples, weights, tmp_path / "out_0.5") == 130
    stop(None)
    assert refine(samples, weights, tmp_path / "out_0.5", "--resume") == 0
    assert len(list((tmp_path / "out_0.5").iterdir())) == SAMPLES
    assert not (tmp_path / "out_0.5.partial").exists()


def test_an_unfinished_run_is_neither_overwritten_nor_mixed_with_another(tmp_path, samples, weights, stop, capsys):
    out, folder = tmp_path / "out.npy", tmp_path / "out.npy.partial"
    stop(1, 3)
    assert refine(samples, weights, out) == 130
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()
    assert refine(samples, weights, out) == 1
    assert (
        "out.npy.partial: holds an unfinished run; pass --resume to go on with it, or remove" in capsys.readouterr().err
    )
    np.save(tmp_path / "other.npy", read_array(samples, "x").numpy() * 0.5)
    np.save(tmp_path / "known.npy", np.zeros((SAMPLES, 16), dtype=bool))
    other_model = tmp_path / "other.safetensors"
    ipr_fast.save_model(ipr_fast.load_model(weights).half(), other_model)
    for options, words in {
        ("--iters", 6): r"iters 5 \(now 6\)",
        ("--seed", 1, "--ratio", 0.5): r"ratio 0\.25 \(now 0\.5\), seed 0 \(now 1\)",
        ("--first-iteration", 2): r"first-iteration 1 \(now 2\)",
        ("--fixed-region",): r"fixed-region False \(now True\)",
        ("--sweep",): r"sweep None \(now True\)",
        ("--noise", "fixed"): r"noise random \(now fixed\)",
        ("--schedule", 2, 1): r"schedule Schedule\(.*overlap=0\.5.*\) \(now Schedule\(.*overlap=1\.0.*\)\)",
        ("--stochasticity", 0.25): r"stochasticity 0\.5 \(now 0\.25\)",
        ("--temperature", 0): r"temperature 1\.0 \(now 0\.0\)",
        ("--first-chain", 3): r"first-chain 0 \(now 3\)",
        ("--dtype", "float16"): r"model \w{16} \(now \w{16}\), dtype as stored \(now float16\)",
        ("--known", tmp_path / "known.npy"): r"known None \(now \w{16}\)",
        ("--model", other_model): r"model \w{16} \(now \w{16}\)",
        ("--chunk", 5): r"chunk 4 \(now 5\)",
    }.items():
        assert refine(samples, weights, out, "--resume", *options) == 1
        assert re.search(rf"out\.npy\.partial: a run of other settings: {words}$", capsys.readouterr().err.strip())
    assert refine(tmp_path / "other.npy", weights, out, "--resume") == 1
    assert re.search(r"other settings: input \w{16} \(now \w{16}\)$", capsys.readouterr().err.strip())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("harm", ["truncated", "a bit", "empty", "another chunk", "another run"])
def test_damaged_and_foreign_chunks_are_made_again(tmp_path, samples, weights, expected, stop, harm):
    out, folder = tmp_path / "out.npy", tmp_path / "out.npy.partial"
    for seed, path in ((1, tmp_path / "other.npy"), (0, out)):
        stop(2, 3)
        assert refine(samples, weights, path, "--seed", seed) == 130
    first, other = folder / "chunk-000000.npz", folder / "chunk-000001.npz"
    data = bytearray(first.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    elif harm == "a bit":
        data[len(data) // 2] ^= 1
    elif harm == "empty":
        data = b""
    elif harm == "another chunk":
        data = other.read_bytes()
    else:
        data = (tmp_path / "other.npy.partial" / first.name).read_bytes()
    first.write_bytes(data)
    stop(None)
    assert refine(samples, weights, out, "--resume") == 0
    assert torch.equal(read_array(out, "x"), expected)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"'])
def test_a_folder_without_readable_settings_is_refused(tmp_path, samples, weights, stop, capsys, text):
    stop(1, 3)
    assert refine(samples, weights, tmp_path / "out.npy") == 130
    (tmp_path / "out.npy.partial" / "run.json").write_text(text)
    assert refine(samples, weights, tmp_path / "out.npy", "--resume") == 1
    assert "out.npy.partial: holds no readable run.json; remove the folder" in capsys.readouterr().err


def test_one_run_at_a_time(tmp_path, samples, weights, capsys):
    (tmp_path / "out.npy.partial").mkdir()
    with alone_in(tmp_path / "out.npy.partial"):
        for options in ([], ["--resume"]):
            assert refine(samples, weights, tmp_path / "out.npy", *options) == 1
            assert "out.npy.partial: another run is at work there" in capsys.readouterr().err


def test_an_interrupt_before_the_first_iteration_leaves_nothing(tmp_path, samples, weights, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(chunks, "refine_batch", interrupted)
    assert refine(samples, weights, tmp_path / "out.npy") == 130
    assert capsys.readouterr().err == "ipr-fast refine: interrupted (nothing was saved)\n"
    assert sorted(tmp_path.iterdir()) == before


def test_files_of_others_are_left_in_the_folder(tmp_path, samples, weights, stop):
    stop(1, 3)
    assert refine(samples, weights, tmp_path / "out.npy") == 130
    (tmp_path / "out.npy.partial" / "mine.txt").write_text("kept")
    stop(None)
    assert refine(samples, weights, tmp_path / "out.npy", "--resume") == 0
    assert [file.name for file in (tmp_path / "out.npy.partial").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_in_one_line_and_gone_on_from(tmp_path, samples, weights, stop, monkeypatch, capsys):
    monkeypatch.setattr(chunks, "SAVE_EVERY", 0.0)
    out, written = tmp_path / "out.npy", tmp_path / "out.npy.partial" / "chunk-000000.npz"
    with full_disk(1500):  # the settings fit, a chunk does not
        assert refine(samples, weights, out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"File too large: '{written}'" in error
    assert not written.parent.exists()
    stop(1, 1)
    assert refine(samples, weights, out) == 130
    stop(None)
    before = written.read_bytes()
    with full_disk(1500):
        assert refine(samples, weights, out, "--resume") == 1
    assert written.read_bytes() == before
    assert refine(samples, weights, out, "--resume") == 0


def test_a_chunk_is_saved_once_a_minute(tmp_path, samples, weights, monkeypatch):
    """As if an iteration took 25 seconds."""
    now, saved, real = [0.0], [], chunks.RunFolder.save
    monkeypatch.setattr(
        chunks.RunFolder, "save", lambda self, i, kept: saved.append((i, kept.iteration)) or real(self, i, kept)
    )
    monkeypatch.setattr(chunks.time, "monotonic", lambda: now.__setitem__(0, now[0] + 12.5) or now[0])
    assert refine(samples, weights, tmp_path / "out.npy", "--iters", 12, "--chunk", SAMPLES) == 0
    iterations = [iteration for _, iteration in saved]
    assert iterations[-1] == 12
    assert 2 <= len(iterations) <= 4
    assert iterations == sorted(set(iterations))


def test_samples_that_are_not_finite_are_not_gone_on_from(tmp_path, model):
    plan, run = chunks.ChunkPlan(2, 2, 1, 5), {"seed": 0}
    folder = chunks.RunFolder(tmp_path, run, plan)
    bad = torch.full((2, 1, 4, 4), float("nan"))
    for iteration, is_usable in ((3, False), (5, True)):
        folder.save(0, chunks.Snapshot(iteration, bad))
        assert (folder.load(0, torch.zeros(2, 1, 4, 4)) is not None) == is_usable


def test_the_bar_tells_the_chunk(tmp_path, samples, weights, capsys, monkeypatch):
    monkeypatch.setattr(chunks, "tqdm", partial(chunks.tqdm, mininterval=0, miniters=1))  # draws every state
    arguments = ["refine", samples, "--model", weights, "--out", tmp_path / "out.npy", "--iters", 1, "--chunk", CHUNK]
    assert main([*map(str, arguments)]) == 0
    bars = capsys.readouterr().err
    assert all(f"{i}/3" in bars for i in (1, 2, 3))
    assert "refine" in bars


def test_settings_are_plain_to_read(tmp_path, samples, weights, stop):
    stop(0, 2)
    assert refine(samples, weights, tmp_path / "out.npy") == 130
    settings = json.loads((tmp_path / "out.npy.partial" / "run.json").read_text())
    assert settings["iters"] == ITERS
    assert settings["chunk"] == CHUNK
    assert settings["known"] is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_killed_process_is_gone_on_from(tmp_path, samples, weights, number):
    """Killed once it has saved, which it does after every one of many short iterations."""
    out, first = tmp_path / "out.npy", tmp_path / "out.npy.partial" / "chunk-000000.npz"
    options = ["--iters", 40, "--schedule", 1, 1]
    assert refine(samples, weights, tmp_path / "expected.npy", *options) == 0
    code = """
import signal, sys
from ipr_fast.cli import chunks
from ipr_fast.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background has not
chunks.SAVE_EVERY = 0.0
sys.exit(main())
"""
    arguments = ["refine", samples, "--model", weights, "--out", out, "--chunk", CHUNK, "--quiet", *options]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        error = process.communicate()[1]
    assert not out.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert re.fullmatch(r"ipr-fast refine: interrupted \(\d of 3 chunks done.*--resume goes on\)\n", error)
    with np.load(first) as kept:
        assert 1 <= kept["iteration"] <= 40
    assert refine(samples, weights, out, *options, "--resume") == 0
    assert out.read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert not first.parent.exists()


@pytest.mark.parametrize("lowest", [0.0, -0.1])
def test_samples_of_another_range_get_one_warning(tmp_path, weights, capsys, lowest):
    """Images in [0, 1], exactly or with some numbers below: told once, in one line, and not once a chunk."""
    x = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * (1 - lowest) + lowest
    np.save(tmp_path / "x.npy", x.numpy())
    command = ["refine", str(tmp_path / "x.npy"), "--out", str(tmp_path / "y.npy"), "--iters", "1"]
    assert main([*command, "--model", str(weights), "--chunk", "2", "--quiet"]) == 0
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    few = ", 0 of 12 samples have a number below -0.5" if lowest else ""
    assert re.search(rf"^ipr-fast refine: warning: the input lies in \[[\d.e-]+, \d\.?\d*\]{few}, but Patch", told)


def test_a_run_that_was_killed_before_it_had_begun_begins(tmp_path, samples, weights, expected):
    out = tmp_path / "y.npy"
    folder = tmp_path / "y.npy.partial"
    for options in ([], ["--resume"]):
        folder.mkdir()
        (folder / ("run.json" + chunks.WRITING)).write_text("{")
        assert refine(samples, weights, out, *options) == 0
        assert torch.equal(read_array(out, "x"), expected)
        assert not folder.exists()
