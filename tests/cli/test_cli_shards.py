"""`ipr-fast evaluate NAME`: experiments in shards."""

import json
import signal
import socket

import pytest

from ipr_fast.cli.main import main
from ipr_fast.evaluation.scale.folder import RunFolder

pytest.importorskip("pyarrow")
from small_plans import PLAN, rows, write_plan


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_plan(tmp_path_factory.mktemp("plan")))


def evaluated(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu", "--quiet"])


def test_a_run_and_its_shares_have_the_same_rows(file, tmp_path, capsys):
    assert evaluated(file, "--out", tmp_path / "a", "--count", 6) == 0
    assert capsys.readouterr().out.startswith(f"4 of 4 shards are in {tmp_path / 'a'}")
    assert evaluated(file, "--out", tmp_path / "b", "--count", 6, "--shard", "2/2") == 0
    assert capsys.readouterr().out == f"2 of 4 shards are in {tmp_path / 'b'}\n"
    assert evaluated(file, "--out", tmp_path / "b", "--count", 6, "--shard", "1/2") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert {row[0] for row in rows(tmp_path / "a")} == {0, 1}


def test_all_samples_are_stored_if_asked_for(file, tmp_path):
    assert evaluated(file, "--out", tmp_path, "--count", 8, "--samples") == 0
    assert None not in {row[-1] for row in rows(tmp_path)}


def test_the_bar_shows_shards_samples_a_second_and_the_time_left(file, tmp_path, capsys):
    assert main(["evaluate", file, "--out", str(tmp_path), "--count", "6", "--device", "cpu"]) == 0
    bar = capsys.readouterr().err
    assert "plan, 4 shards left:   0%" in bar
    assert "plan, 0 shards left: 100%" in bar
    assert "12/12 [" in bar
    assert "sample/s]" in bar or "s/sample]" in bar


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out: FILE needs a folder for its records"),
        (["--out", "OUT", "--iters", 3], "--iters is not an option of FILE, which has model, count, shard, ray"),
        (["--out", "OUT", "--workers", 3], "--workers is the number of workers on Ray; give --ray too"),
        (["--out", "OUT", "--seed", 3], "--seed: FILE has seeds of its own"),
        (["--out", "OUT", "--model", "nobody"], "model must be a bundled model"),
        (["--out", "OUT", "--model", "token-sudoku-9x9"], "model token-sudoku-9x9 makes samples of token-sudoku-9x9"),
        (["--out", "FILE"], "FILE: cannot be made a folder"),
        (
            ["--out", "OUT", "--count", 2**32],
            f"samples must be at most {2**21} for each of 2 seeds with batch 4, got {2**32}",
        ),
        (["--out", "OUT", "--count", 2**40], f"--count must be an int in 1..{2**32}, got {2**40}"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(file, tmp_path, arguments, said, capsys):
    words = [str(word).replace("FILE", file).replace("OUT", str(tmp_path / "out")) for word in arguments]
    assert evaluated(file, *words) == 1
    error = capsys.readouterr().err
    assert said.replace("FILE", file) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_experiment_without_its_checkpoint_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluated("counting-polygons", "--count", 1, "--out", "x") == 1
    said = "--model: counting-polygons needs the published checkpoint (https://github.com/Chrixtar/SRM/releases/"
    error = capsys.readouterr().err
    assert said in error
    assert error.endswith("give it by --model FILE\n")
    assert not (tmp_path / "x").exists()


def test_a_wrong_schedule_is_told_with_its_plan_and_arm(tmp_path, capsys):
    schedule = "iterations = 3\nrefine = {{ steps_per_patch = 2, overlap = 1.0, shift = 0 }}"
    other = write_plan(tmp_path, PLAN.replace("iterations = 3", schedule))
    assert evaluated(other, "--out", tmp_path / "out") == 1
    assert "experiment plan: arm refined: refine: shift must be a finite number in" in capsys.readouterr().err


def test_the_folder_of_another_run_is_named(file, tmp_path, capsys):
    assert evaluated(file, "--out", tmp_path, "--count", 3) == 0
    assert evaluated(file, "--out", tmp_path, "--count", 4) == 1
    assert f"{tmp_path}: holds another run, of plan: samples 3 (now 4)\n" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest) >= {"experiment", "configuration", "weights", "ipr_fast", "torch", "dtype", "device"}


def test_an_interrupted_run_says_how_to_go_on(file, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "compute", lambda *arguments: signal.raise_signal(signal.SIGINT))
        assert evaluated(file, "--out", tmp_path, "--count", 3) == 130
    said = "ipr-fast evaluate: interrupted (the same command goes on with the shards that are left)"
    assert capsys.readouterr().err.strip().endswith(said)
    assert evaluated(file, "--out", tmp_path, "--count", 3) == 0


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{}", "--ray: no cluster answers at 127.0.0.1:{} ([Errno 111] Connection refused)"),
        ("ray://127.0.0.1:{}", "--ray: no cluster answers at ray://127.0.0.1:{} ([Errno 111] Connection refused)"),
        ("[::1]:{}", "--ray: no cluster answers at [::1]:{} ("),
        ("head", "--ray must be auto, local, HOST:PORT or ray://HOST:PORT, got 'head'"),
        ("head:x", "--ray must be auto, local, HOST:PORT or ray://HOST:PORT, got 'head:x'"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(file, tmp_path, address, said, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens at it
        port = taken.getsockname()[1]
        assert evaluated(file, "--out", tmp_path / "out", "--ray", address.format(port)) == 1
    assert said.format(port) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1"])
def test_a_wrong_share_is_told(file, shard, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluated(file, "--shard", shard)
    assert ended.value.code == 2
    assert "must be I/N with 1 <= I <= N" in capsys.readouterr().err


def test_options_of_shards_are_refused_elsewhere(capsys):
    assert evaluated("repair", "--shard", "1/2") == 1
    assert "--shard is not an option of repair, which has model, count, iters, pairs" in capsys.readouterr().err
