"""The cost of running in shards: little time outside the engine, and memory that does not grow with the samples."""

import gc
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ipr_fast.evaluation import arms
from ipr_fast.evaluation.arms import Arm
from ipr_fast.evaluation.scale import shards
from ipr_fast.evaluation.scale.folder import RunFolder
from ipr_fast.evaluation.scale.plan import Plan
from ipr_fast.evaluation.scale.summary import summarise

pytest.importorskip("pyarrow")
import pyarrow.parquet
from small_plans import PLAN, run_file, run_plan, write_plan


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_at_most_3_percent_of_the_time_is_outside_the_engine(tmp_path, monkeypatch):
    """By the time of this thread, which does not count what other processes take; with the writing of the files."""
    pytest.importorskip("sklearn")
    plan = Plan("x", "", "digit-sudoku-4x4", "digit-sudoku-4x4", 64, (Arm("IPR", 20),), (), seeds=(0,))
    run_plan(plan.changed(samples=1), tmp_path / "warm")  # imports, digits and the judge's network
    for module in (arms, shards):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=time.thread_time))
    seconds, compute = [], RunFolder.compute

    def timed(*arguments):
        begun = time.thread_time()
        compute(*arguments)
        seconds.append(time.thread_time() - begun)

    monkeypatch.setattr(RunFolder, "compute", timed)
    run = run_plan(plan, tmp_path / "timed")
    facts = pyarrow.parquet.read_metadata(run.file(shards.shards_of(plan)[0])).metadata
    (whole,) = seconds
    assert float(facts[b"engine_seconds"]) >= 0.97 * whole


def test_memory_does_not_grow_with_the_shards(tmp_path, monkeypatch):
    """All the shards after the second one add less than the size of one, to what is held and to the peak."""
    text = PLAN.split('[arms."best')[0].replace("samples = 10", "samples = 24").replace("kept = 5", "kept = 24")
    held, peaks, compute, read = [], [], RunFolder.compute, RunFolder.read

    def measure():
        now, peak = tracemalloc.get_traced_memory()  # of Python and NumPy
        held.append(now + tensor_bytes() + pyarrow.total_allocated_bytes())
        peaks.append(peak)
        tracemalloc.reset_peak()

    def traced_compute(*arguments):
        compute(*arguments)
        measure()

    def traced_read(*arguments):
        measure()
        return read(*arguments)

    def check(count):
        shard = min(RunFolder.read(run, each).nbytes for each in shards.shards_of(run.plan))
        assert len(held) == len(peaks) == count
        assert max(held[2:]) - held[1] < shard
        assert max(peaks[2:]) - peaks[1] < shard
        held.clear(), peaks.clear()

    tracemalloc.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "compute", traced_compute)
            run = run_file(write_plan(tmp_path, text), tmp_path / "out")
        check(12)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "read", traced_read)
            summarise(run)
        check(12)
    finally:
        tracemalloc.stop()


def tensor_bytes() -> int:
    """The bytes of all tensors that Python holds."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.layout == torch.strided]
    storages = [each.untyped_storage() for each in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
