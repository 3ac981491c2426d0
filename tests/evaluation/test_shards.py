"""Runs in shards: rows do not depend on the split, and a run is resumed, refused or repaired as it should be."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import full_disk

import ipr_fast
from ipr_fast.evaluation.arms import Arm
from ipr_fast.evaluation.scale.folder import MANIFEST, RunFolder, Share, open_run
from ipr_fast.evaluation.scale.plan import Comparison, Plan, read_plan
from ipr_fast.evaluation.scale.run import load_planned
from ipr_fast.evaluation.scale.shards import Shard, Worker, shards_of
from ipr_fast.outputs import alone_in
from ipr_fast.tasks.even_pixels import EvenPixels

pytest.importorskip("pyarrow")
import pyarrow
from small_plans import PLAN, QUICK, rows, run_file, run_plan, write_plan

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """The folder of a run that was never stopped."""
    return run_file(file, tmp_path_factory.mktemp("runs") / "whole").path


def test_a_row_for_every_chain_arm_and_recorded_iteration(file, whole):
    found, plan = rows(whole), read_plan(str(file))
    expected = [
        (seed, chain, arm.name, iteration)
        for seed in (0, 1)
        for chain in range(10)
        for arm in plan.arms
        for iteration in plan.iterations(arm)
    ]
    assert [row[:4] for row in found] == sorted(expected)


def test_rows_are_those_of_generate_batch_and_refine_batch(file, whole):
    plan, judge = read_plan(str(file)), EvenPixels().judge()
    model = ipr_fast.load_model(plan.model)
    x = ipr_fast.generate_batch(4, model=model, seed=1, chain_ids=torch.arange(4, 8))
    refined = ipr_fast.refine_batch(
        x, ipr_fast.random_patches(0.25), 3, model=model, seed=1, chain_ids=torch.arange(4, 8)
    )
    found = {row[1]: row for row in rows(whole) if (row[0], *row[2:4]) == (1, "refined", 3)}
    report = judge(refined)
    assert [found[chain][4] for chain in range(4, 8)] == report.good.tolist()
    assert [found[chain][5] for chain in range(4, 8)] == report.imbalance.tolist()
    assert found[4][-1] == refined[0].numpy().tobytes()
    assert found[5][-1] is None  # of the first five chains only


@pytest.mark.parametrize("shares", [2, 5])
def test_rows_do_not_depend_on_the_split(file, whole, tmp_path, shares):
    for index in reversed(range(shares)):
        run_file(file, tmp_path, Share(index + 1, shares))
    assert rows(tmp_path) == rows(whole)


def test_a_damaged_shard_is_made_again(file, whole, tmp_path):
    folder = run_file(file, tmp_path)
    first, second, third, *_ = sorted(tmp_path.glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-100])
    half = len(second.read_bytes()) // 2
    second.write_bytes(second.read_bytes()[:half] + b"damage" + second.read_bytes()[half + 6 :])
    third.write_bytes(sorted(tmp_path.glob("*.parquet"))[-1].read_bytes())  # whole, but another shard
    untouched = sorted(tmp_path.glob("*.parquet"))[-1].stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"0000000003\.parquet: a damaged shard"):
        folder.read(shards_of(folder.plan)[0])
    run_file(file, tmp_path)
    assert rows(tmp_path) == rows(whole)
    assert sorted(tmp_path.glob("*.parquet"))[-1].stat().st_mtime_ns == untouched


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), pyarrow.ArrowMemoryError("no room")])
def test_a_shard_that_cannot_be_read_now_is_not_removed(file, tmp_path, monkeypatch, error):
    folder = run_file(file, tmp_path, Share(1, 6))
    shard = shards_of(folder.plan)[0]

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        folder.is_done(shard)
    assert folder.file(shard).exists()


def test_a_folder_in_the_place_of_a_shard_is_named(file, tmp_path):
    folder = run_file(file, tmp_path)
    first = min(tmp_path.glob("*.parquet"))
    first.unlink()
    first.mkdir()
    said = rf"{first.name}: is a folder, in the place of a shard's file; remove it$"
    with pytest.raises(ValueError, match=said):
        run_file(file, tmp_path)
    with pytest.raises(ValueError, match=said):
        folder.finished()


def test_what_is_wrong_with_a_whole_file_is_named_alone(file, tmp_path):
    folder = run_file(file, tmp_path)
    first, second, *_ = shards_of(folder.plan)
    folder.file(first).write_bytes(folder.file(second).read_bytes())
    with pytest.raises(
        ValueError, match=rf"another shard \({folder._name(second)}\), expected {folder._name(first)}; "
    ):
        folder.read(first)
    folder.plan = replace(folder.plan, arms=folder.plan.arms[:1], comparisons=())
    with pytest.raises(ValueError, match=r"parquet: \d+ rows in place of 4; "):
        folder.read(second)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"format": 1', '"format": 2', r"manifest\.json: format must be 1, got 2$"),
        ('"samples": 10', '"samples": 600', r"the hash of its plan must be its configuration \w+, got \w+$"),
    ],
)
def test_an_edited_manifest_is_refused_by_name(file, tmp_path, old, new, said):
    run_file(file, tmp_path, Share(1, 6))
    text = (tmp_path / MANIFEST).read_text()
    assert text.count(old) == 1
    (tmp_path / MANIFEST).write_text(text.replace(old, new))
    for opened in (RunFolder.at, lambda path: run_file(file, path)):
        with pytest.raises(ValueError, match=said):
            opened(tmp_path)


def test_a_run_that_is_done_computes_nothing(file, tmp_path, monkeypatch):
    run_file(file, tmp_path)
    monkeypatch.setattr(Worker, "compute", None)
    run_file(file, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 11}, r"holds another run, of plan: samples 10 \(now 11\)"),
        ({"seeds": (0, 2)}, r"seeds \[0, 1\] \(now \[0, 2\]\)"),
        ({"arms": (Arm("one pass"), Arm("refined", 4), Arm("best of 2", 1, "independent"))}, "of plan: arms$"),
    ],
)
def test_the_folder_of_another_run_is_refused_by_name(file, whole, changes, said):
    with pytest.raises(ValueError, match=said):
        run_plan(replace(read_plan(str(file)), **changes), whole)


def test_other_weights_are_refused(file, whole, tmp_path):
    other = write_plan(tmp_path)
    model = ipr_fast.load_model(tmp_path / "model.safetensors")
    model.role.weight.data += 1
    ipr_fast.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds another run, of plan: weights \w+ \(now \w+\), model "):
        run_file(other, whole)


def test_a_title_and_comparisons_may_change(file, whole):
    plan = replace(read_plan(str(file)), title="Another", comparisons=(Comparison("refined", "one pass"),))
    run_plan(plan, whole)


def test_folders_that_are_none_of_a_run_are_refused(file, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        run_file(file, tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"not a folder of a run: it has no readable manifest\.json"):
        run_file(file, tmp_path)
    with pytest.raises(ValueError, match="cannot be made a folder"):
        run_file(file, tmp_path / "thesis.tex" / "out")


def test_a_folder_that_may_not_be_written_is_refused(file, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    with pytest.raises(ValueError, match="no permission to write in it"):
        run_file(file, tmp_path)


def test_a_full_disk_is_one_error_and_loses_no_shard(file, whole, tmp_path):
    plan = read_plan(str(file))
    run_file(file, tmp_path, Share(1, 5))
    with full_disk(2000), pytest.raises(OSError, match=r"File too large: '.*parquet'"):
        run_file(file, tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == len(shards_of(plan)[::5])
    run_file(file, tmp_path)
    assert rows(tmp_path) == rows(whole)


def test_two_drivers_at_once_are_refused_and_two_shares_are_not(file, tmp_path):
    folder = run_file(file, tmp_path)
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is at work there"):
        run_file(file, tmp_path)
    with open_run(tmp_path, folder.manifest, Share(1, 3)):
        run_file(file, tmp_path, Share(2, 3))
        for share in (Share(1, 3), Share(1, 2), Share()):
            with pytest.raises(ValueError, match="another run is at work there"):
                run_file(file, tmp_path, share)


def test_locks_of_a_division_that_was_given_up_refuse_no_job(file, tmp_path):
    folder = run_file(file, tmp_path, Share(1, 3))
    with open_run(tmp_path, folder.manifest, Share(1, 2)):
        run_file(file, tmp_path, Share(2, 2))
        with pytest.raises(ValueError, match="another run is at work there"):
            run_file(file, tmp_path, Share(1, 3))


def test_a_manifest_that_another_job_writes_at_this_moment_is_no_other_file(file, tmp_path, monkeypatch):
    manifest, exists = run_file(file, tmp_path / "whole", Share(1, 6)).manifest, Path.exists

    def just_before(path):
        found = exists(path)
        if path == tmp_path / "run" / MANIFEST and not found:
            path.write_text(json.dumps(manifest))
        return found

    monkeypatch.setattr(Path, "exists", just_before)
    with open_run(tmp_path / "run", manifest, Share(2, 6)) as folder:
        assert folder.manifest == manifest


def test_shards_are_ranges_of_chains_and_the_seeds_take_turns(file):
    plan = read_plan(str(file))
    assert [(s.seed, s.first, s.last) for s in shards_of(plan)] == [
        *((0, 0, 4), (1, 0, 4)),
        *((0, 4, 8), (1, 4, 8)),
        *((0, 8, 10), (1, 8, 10)),
    ]


def test_what_is_left_of_a_killed_run_is_removed(file, tmp_path):
    run_file(file, tmp_path)
    (tmp_path / "seed-0.parquet.host-1.writing").touch()
    run_file(file, tmp_path)
    assert not list(tmp_path.glob("*.writing"))


def test_a_chains_clues_belong_to_its_id():
    pytest.importorskip("sklearn")
    arms = (Arm("K = 1", swapped=1),)
    plan = Plan("x", "", "digit-sudoku-4x4", "digit-sudoku-4x4", 8, arms, (), clues=(2, 8))
    worker = Worker(plan, ipr_fast.load_model(plan.model))
    known, values = worker._boards(Shard(3, 2, 6), (2, 8))
    again = worker._boards(Shard(3, 4, 5), (2, 8))
    assert torch.equal(known[2:3], again.known)
    assert torch.equal(values[2:3], again.values)
    assert len(known.unique(dim=0)) == 4
    assert not torch.equal(worker._boards(Shard(4, 2, 6), (2, 8)).known, known)
    table = worker.compute(Shard(3, 2, 4))[0].table()
    assert table.column("model_calls").to_pylist() == [0, 0]


def test_a_model_of_another_task_is_refused(file):
    plan = replace(read_plan(str(file)), task="digit-sudoku-4x4")
    with pytest.raises(ValueError, match="makes samples of even-pixels, but the task is digit-sudoku-4x4"):
        Worker(plan, ipr_fast.load_model(plan.model))
    plan = replace(read_plan(str(file)), clues=(0, 3))
    with pytest.raises(ValueError, match="even-pixels has no cells"):
        Worker(plan, ipr_fast.load_model(plan.model))


def test_a_model_with_a_configuration_of_its_own_takes_the_place_of_a_published_one(file):
    """As `evaluate counting-polygons --model` with what `train` wrote."""
    plan = replace(read_plan(str(file)), config="even_pixels")
    assert load_planned(plan, torch.device("cpu"), "float32").config.width == QUICK["width"]


def test_nothing_is_lost_or_doubled_by_100_kills(tmp_path):
    """Processes that run one plan are killed at random moments of their work, 100 of them, one after another."""
    text = PLAN.split("[arms.")[0] + '[arms."one pass"]\n\n[arms.refined]\niterations = 1\n'
    for old, new in (("samples = 10", "samples = 90"), ("batch = 4", "batch = 1"), ("kept = 5", "kept = 0")):
        text = text.replace(old, new)
    write_plan(tmp_path, text)
    script = [sys.executable, str(TESTS / "kill_runs.py"), str(tmp_path), "100"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" shards done after 100 kills\n")
    run_file(tmp_path / "plan.toml", tmp_path / "killed")
    run_file(tmp_path / "plan.toml", tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.writing"))
    assert RunFolder.at(tmp_path / "killed").identity == RunFolder.at(tmp_path / "whole").identity


def test_a_corrected_plan_takes_the_place_of_one_without_shards(file, tmp_path):
    folder = run_file(file, tmp_path, Share(1, 6))
    other = {**folder.manifest, "weights": "others"}
    with pytest.raises(ValueError, match=r"holds another run, of .*: weights"), open_run(tmp_path, other, Share()):
        pass
    for shard in tmp_path.glob("*.parquet"):
        shard.unlink()
    with pytest.raises(ValueError, match="holds another run"), open_run(tmp_path, other, Share(2, 3)):
        pass
    with open_run(tmp_path, other, Share()):
        assert RunFolder.at(tmp_path).manifest == other
