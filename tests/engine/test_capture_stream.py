"""Sets of graphs beside each other, on a fake of CUDA: none takes another's stream, workspace or capture."""

import threading

import pytest
import torch
from fake_cuda import FakeCuda

from ipr_fast.engine import capture_stream, graph_cache, memory
from ipr_fast.engine.graphs import CudaCapture, Graphs

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["torch 2.12", "torch 2.11"])
def cuda(request, monkeypatch):
    monkeypatch.setattr(capture_stream, "FREED_WITH_GRAPHS", request.param)
    monkeypatch.setattr(capture_stream.CaptureStream, "_all", {})
    monkeypatch.setattr(capture_stream.CaptureStream, "_idle", {})
    return FakeCuda(monkeypatch, frees=request.param)


class Set:
    """Graphs of one set, each of which holds a workspace."""

    def __init__(self, cuda, number=2):
        self.cuda, self.replays = cuda, Graphs(CudaCapture(CPU))
        for name in range(number):
            self.capture(name)

    def capture(self, name):
        self.replays.add(name, str(name), self.cuda.product)

    @property
    def graphs(self):
        """Those captured in the set's pool."""
        return [graph for graph in self.cuda.graphs if graph.pool() == self.replays.capture.pool]

    @property
    def streams(self):
        return {graph.stream for graph in self.graphs}

    @property
    def is_whole(self):
        return all(graph.holds and not self.cuda.holds_freed_memory(graph) for graph in self.graphs)


def test_two_living_sets_share_no_stream_and_a_later_one_takes_that_of_a_dead_one(cuda):
    sets = [Set(cuda) for _ in range(5)]
    assert all(len(each.graphs) == 2 for each in sets)
    assert len({stream for each in sets for stream in each.streams}) == 5
    freed = sets.pop(2).streams
    assert Set(cuda).streams == freed


def test_a_replay_alone_keeps_its_stream(cuda):
    replay = CudaCapture(CPU)("alone", cuda.product)
    (stream,) = {graph.stream for graph in cuda.graphs}
    assert all(Set(cuda).streams != {stream} for _ in range(40))
    del replay
    assert Set(cuda).streams == {stream}


def test_sets_beyond_the_streams_of_torch_still_own_their_workspaces(cuda):
    sets = [Set(cuda, 1) for _ in range(40)]
    del sets[::2]
    cuda.clear_workspaces()
    assert all(each.is_whole for each in sets)


@pytest.mark.parametrize("clears", [False, True], ids=["", "torch.compile beside it"])
def test_no_end_of_another_set_frees_a_workspace(cuda, clears):
    for _ in range(3):
        kept, passing = Set(cuda), Set(cuda)
        for _ in range(3):
            del passing
            if clears:
                cuda.clear_workspaces()
            assert kept.is_whole
            passing = Set(cuda)
            kept.capture(f"later {len(kept.replays)}")
            assert kept.is_whole
            assert passing.is_whole


def test_a_workspace_that_other_code_allocated_on_the_stream_is_not_held(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(capture_stream.CaptureStream, "_idle", {})
    for _ in range(32):
        with cuda.on(torch.cuda.Stream()):
            cuda.product()
    kept = Set(cuda)
    cuda.clear_workspaces()
    assert kept.is_whole


def test_a_thread_that_fits_lanes_or_frees_memory_waits_for_an_open_capture(cuda):
    is_open, may_end, done = threading.Event(), threading.Event(), []

    def function():
        cuda.product()
        if cuda._open:
            is_open.set()
            assert may_end.wait(10)

    def fit():
        done.append(memory.available_bytes(torch.device("cuda")))
        graph_cache.drop_kept()
        done.append("dropped")

    capturing = threading.Thread(target=lambda: Graphs(CudaCapture(CPU)).add("slow", "slow", function))
    fitting = threading.Thread(target=fit)
    capturing.start()
    assert is_open.wait(10)
    fitting.start()
    fitting.join(0.2)
    assert not done
    may_end.set()
    for thread in (capturing, fitting):
        thread.join(10)
    assert len(done) == 2
    assert not cuda.spoiled
