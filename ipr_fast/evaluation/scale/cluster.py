"""Run a plan on Ray: an actor a GPU, or a CPU core, each of which computes shards and writes their files.

An actor that dies is not restarted: its shard is queued again, and another actor asked for, which Ray places when it
can. So a run goes on while nodes leave and join. Only this module imports ray.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch

from ipr_fast.errors import first_line, import_extra
from ipr_fast.evaluation.scale.folder import RunFolder, Share, make_manifest
from ipr_fast.evaluation.scale.run import ShardBar, load_planned
from ipr_fast.evaluation.scale.shards import Shard, Worker

LOCAL = "local"  # in place of an address: start Ray on this machine
AUTO = "auto"  # the cluster that this machine belongs to
TRIES = 5  # of a shard, and of actors one after another that do not start
POLL = 1.0  # seconds between looks at the cluster
ANSWER = 10.0  # seconds in which an address must accept a connection


def run_on_ray(
    folder: RunFolder, share: Share, address: str, *, workers: int | None = None, progress: bool = False
) -> None:
    """Compute the shards of a share that are not done, on the actors of a Ray cluster.

    address: of a cluster, "auto" for that of this machine, or "local" to start one here. workers: at most so many
    actors; by default as many as the cluster has GPUs, or CPU cores where the run's device is the CPU.
    Raises ValueError that names the shards on which five actors have died, what an actor raised, or an address without
    a cluster.
    """
    ray = load_ray()
    try:
        ray.init(
            address=None if address == LOCAL else address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="error",
        )
    except ConnectionError as error:
        where = "on this machine" if address == AUTO else f"at {address}"
        raise ValueError(f"--ray: no cluster of Ray runs {where}") from error
    try:
        left, samples_done = folder.pending(share)
        with ShardBar(folder, left, samples_done, progress) as bar:
            Crew(ray, folder, workers).work(left, bar)
    finally:
        ray.shutdown()


class Crew:
    """The actors of a run, and the shards that they have not finished."""

    def __init__(self, ray: ModuleType, folder: RunFolder, workers: int | None) -> None:
        self.ray, self.folder, self.workers = ray, folder, workers
        self.device = folder.manifest["device"]
        needs = {"num_gpus": 1, "num_cpus": 1} if self.device == "cuda" else {"num_cpus": 1}
        self._actor = ray.remote(**needs, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(Actor)
        self._starting: dict[Any, Any] = {}  # a reference to what an actor's ready() returns: the actor
        self._working: dict[Any, tuple[Any, Shard]] = {}
        self._idle: list[Any] = []
        self._failed_starts = 0

    def work(self, shards: list[Shard], bar: ShardBar) -> None:
        """Compute shards; return when all are done, or have had five tries."""
        queue, tries, poison = deque(shards), Counter[Shard](), list[Shard]()
        while queue or self._working:
            while queue and self._idle:
                self._give(self._idle.pop(), queue.popleft())
            self._hire(len(queue))
            ready, _ = self.ray.wait([*self._starting, *self._working], num_returns=1, timeout=POLL)
            for reference in ready:
                if reference in self._starting:
                    self._welcome(reference)
                    continue
                actor, shard = self._working.pop(reference)
                if self._outlived(reference, actor):
                    self._check_written(shard)
                    bar.finished(shard)
                    self._idle.append(actor)
                    continue
                tries[shard] += 1
                if tries[shard] < TRIES:
                    queue.append(shard)
                else:
                    poison.append(shard)
        if poison:
            names = ", ".join(shard.name for shard in poison)
            raise ValueError(f"{self.folder.path}: {TRIES} workers died on each of these shards: {names}")

    def _hire(self, queued: int) -> None:
        """Ask for actors, without waiting for them: at least one, for which a cluster that scales adds a node."""
        resource = "GPU" if self.device == "cuda" else "CPU"
        room = max(1, int(self.ray.cluster_resources().get(resource, 0)))
        wanted = min(queued, (room if self.workers is None else self.workers) - len(self._working))
        for _ in range(wanted - len(self._starting) - len(self._idle)):
            actor = self._actor.remote(str(self.folder.path.resolve()), self.folder.manifest)
            self._starting[actor.ready.remote()] = actor

    def _welcome(self, reference: Any) -> None:
        """Take an actor into service: only now is it given a shard."""
        actor = self._starting.pop(reference)
        if self._outlived(reference, actor):
            self._failed_starts = 0
            self._idle.append(actor)
            return
        self._failed_starts += 1
        if self._failed_starts == TRIES:
            raise ValueError(f"ray: {TRIES} workers died one after another as they started")

    def _give(self, actor: Any, shard: Shard) -> None:
        self._working[actor.compute.remote(shard)] = actor, shard

    def _outlived(self, reference: Any, actor: Any) -> bool:
        """Whether an actor finished what it was asked for; raise what its code raised."""
        exceptions = self.ray.exceptions
        try:
            self.ray.get(reference)
            return True
        except exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise ValueError(f"a worker failed: {first_line(cause or error)}") from error
        except exceptions.RayError:  # of the actor or its node
            self.ray.kill(actor)  # if it is only out of reach
            return False

    def _check_written(self, shard: Shard) -> None:
        file = self.folder.file(shard)
        if not file.exists():
            raise ValueError(f"{file}: a worker wrote it, but it is not here; the machines must share this folder")


class Actor:
    """Computes shards in a process of its own."""

    def __init__(self, path: str, manifest: dict[str, Any]) -> None:
        self.folder = RunFolder(Path(path), manifest)

    def ready(self) -> None:
        """Load the model; return when that is done."""
        manifest = self.folder.manifest
        device, dtype = torch.device(manifest["device"]), manifest["dtype"]
        model = load_planned(self.folder.plan, device, dtype)
        found = make_manifest(self.folder.plan, model, device, dtype)
        other = [
            f"{name} {found[name]} (the driver {manifest[name]})"
            for name in ("weights", "ipr_fast", "torch")
            if found[name] != manifest[name]
        ]
        if other:
            raise ValueError(f"this machine differs from the driver's: {', '.join(other)}")
        self.worker = Worker(self.folder.plan, model)

    def compute(self, shard: Shard) -> None:
        """Compute a shard and write its file."""
        self.folder.compute(self.worker, shard)


def check_address(address: str) -> None:
    """Raise ValueError unless something accepts connections at an address; Ray would look for minutes."""
    if address in (LOCAL, AUTO):
        return
    try:
        host = urlsplit(address if "://" in address else f"//{address}")
        name, port = host.hostname, host.port
    except ValueError:  # of a port that is no number
        name = port = None
    if not name or not port:
        raise ValueError(f"--ray must be {AUTO}, {LOCAL}, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((name, port), timeout=ANSWER).close()
    except OSError as error:
        raise ValueError(f"--ray: no cluster answers at {address} ({first_line(error)})") from error


def load_ray() -> ModuleType:
    """Import ray; raise MissingExtra or BrokenExtra where that fails."""
    return import_extra("ray", "ray", "cluster", "runs on a cluster")
