"""The crew of a run on Ray, with a stand-in for ray: who is given which shard, and what ends a run."""

from types import SimpleNamespace

import pytest

pytest.importorskip("pyarrow")
from small_plans import run_file, write_plan

from ipr_fast.evaluation.scale import cluster
from ipr_fast.evaluation.scale.cluster import TRIES, Crew
from ipr_fast.evaluation.scale.folder import Share
from ipr_fast.evaluation.scale.shards import Shard


class Failed(Exception):
    """An actor has died."""


class StandIn:
    """Stands in for ray: what an actor is asked for is done, or fails, when it is looked at."""

    class exceptions:
        RayTaskError = ZeroDivisionError
        RayError = Failed

    def __init__(self, act):
        self.act, self.asked, self.killed = act, 0, 0

    def remote(self, **options):
        assert options["max_restarts"] == 0
        return lambda kind: self

    def cluster_resources(self):
        return {"CPU": 2.0}

    def wait(self, references, num_returns, timeout):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        return self.act(*reference)

    def kill(self, actor):
        self.killed += 1


class StandInActor:
    def __init__(self, number):
        self.ready, self.compute = StandInMethod(number, "ready"), StandInMethod(number, "compute")


class StandInMethod:
    def __init__(self, number, name):
        self.number, self.name = number, name

    def remote(self, *arguments):
        return (self.number, self.name, *arguments)


class Bar:
    def __init__(self):
        self.done = []

    def finished(self, shard):
        self.done.append(shard)


@pytest.fixture
def crew(tmp_path):
    file = write_plan(tmp_path)
    folder = run_file(file, tmp_path / "out")

    def make(act):
        ray = StandIn(act)
        crew = Crew(ray, folder, None)

        class Kind:
            @staticmethod
            def remote(path, manifest):
                ray.asked += 1
                return StandInActor(ray.asked)

        crew._actor = Kind
        return crew, ray

    return make


@pytest.mark.parametrize(("address", "where"), [("auto", "on this machine"), ("head:6379", "at head:6379")])
def test_an_address_without_a_cluster_is_told(crew, monkeypatch, address, where):
    def init(**options):
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to")

    monkeypatch.setattr(cluster, "load_ray", lambda: SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=f"--ray: no cluster of Ray runs {where}"):
        cluster.run_on_ray(crew(None)[0].folder, Share(), address)


SHARD_LIST = [Shard(seed, first, first + 4) for seed in (0, 1) for first in (0, 4)]


def test_a_shard_that_kills_five_workers_is_named_and_the_others_are_done(crew):
    def act(number, name, shard=None):
        if shard == SHARD_LIST[1]:
            raise Failed

    hired, ray = crew(act)
    bar = Bar()
    with pytest.raises(ValueError, match=rf"{TRIES} workers died on each of these shards: {SHARD_LIST[1].name}"):
        hired.work(SHARD_LIST, bar)
    assert sorted(bar.done, key=str) == sorted([SHARD_LIST[0], *SHARD_LIST[2:]], key=str)
    assert ray.killed == TRIES
    assert ray.asked <= 2 + TRIES


def test_workers_that_die_as_they_start_end_the_run(crew):
    def act(number, name, shard=None):
        raise Failed

    with pytest.raises(ValueError, match="ray: 5 workers died one after another as they started"):
        crew(act)[0].work(SHARD_LIST, Bar())


def test_what_a_worker_raises_ends_the_run(crew):
    def act(number, name, shard=None):
        if shard is not None:
            raise ZeroDivisionError("No space left on device")

    with pytest.raises(ValueError, match="a worker failed: No space left on device"):
        crew(act)[0].work(SHARD_LIST, Bar())


def test_a_folder_that_is_not_shared_is_told(crew, tmp_path):
    def act(number, name, shard=None):
        if shard is not None:
            (tmp_path / "out" / shard.name).unlink()

    with pytest.raises(ValueError, match="the machines must share this folder"):
        crew(act)[0].work(SHARD_LIST, Bar())


def test_one_worker_is_asked_for_where_there_is_no_room_yet(crew):
    hired, ray = crew(lambda number, name, shard=None: None)
    ray.cluster_resources = dict
    hired.work(SHARD_LIST, Bar())
    assert ray.asked == 1


def test_no_more_workers_are_asked_for_than_there_is_room_or_work(crew):
    hired, ray = crew(lambda number, name, shard=None: None)
    hired.work(SHARD_LIST, Bar())
    assert ray.asked == 2
    hired, ray = crew(lambda number, name, shard=None: None)
    hired.work(SHARD_LIST[:1], Bar())
    assert ray.asked == 1
