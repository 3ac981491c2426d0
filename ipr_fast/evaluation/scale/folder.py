"""The folder of a run: a manifest that says what the run is, and one file for each finished shard."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ipr_fast
from ipr_fast.evaluation.environment import current_commit
from ipr_fast.evaluation.scale.plan import Plan
from ipr_fast.evaluation.scale.records import read_shard, write_shard
from ipr_fast.evaluation.scale.shards import Shard, Worker, shards_of
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.content_hash import content_hash, model_hash
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.outputs import WRITING, alone_in, prepare_folder, read_json, replacing

MANIFEST, FORMAT = "manifest.json", 1
ANOTHER = "another run is at work there"


@dataclass(frozen=True)
class Share:
    """Every total-th shard of a run, from the index-th on (1..total); 1 of 1: all of them."""

    index: int = 1
    total: int = 1


def make_manifest(plan: Plan, model: Denoiser | TokenDenoiser, device: torch.device, dtype: str) -> dict[str, Any]:
    """Describe what decides a run's rows: plan, weights, versions, dtype and kind of device."""
    described = plan.to_dict()
    return {
        "format": FORMAT,
        "experiment": plan.name,
        "configuration": _configuration(described),
        "weights": model_hash(model, plan.model),
        "ipr_fast": ipr_fast.__version__,
        "torch": torch.__version__,
        "dtype": dtype,
        "device": device.type,
        "commit": current_commit(),
        "plan": json.loads(json.dumps(described)),
    }


def _configuration(plan: dict[str, Any]) -> str:
    """Hash the values of a plan that decide its rows."""
    decides = {name: value for name, value in plan.items() if name not in ("title", "comparisons")}
    return content_hash(json.dumps(decides, sort_keys=True))


class RunFolder:
    """Folder of a run of a plan."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.plan = Plan.from_dict(manifest["plan"])
        decides = [name for name in manifest if name not in ("commit", "plan")]
        self.identity = content_hash(json.dumps({name: manifest[name] for name in decides}))

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run, to read it. Raises ValueError for another folder."""
        return cls(path, _read_manifest(path))

    def file(self, shard: Shard) -> Path:
        return self.path / shard.name

    def _name(self, shard: Shard) -> str:
        """The name of a shard among those of all runs, which its file holds."""
        return f"{self.identity} {shard.name}"

    def read(self, shard: Shard, wanted: Callable[[str], bool] | None = None) -> Any:
        """Read a shard's table, or the wanted columns of it. Raises as `read_shard` does."""
        return read_shard(self.file(shard), self._name(shard), shard.num_rows(self.plan), wanted)

    def finished(self) -> list[Shard]:
        """Return the shards whose files are there, whole or not. Raises ValueError for a folder in a file's place."""
        return [shard for shard in shards_of(self.plan) if self._is_there(shard)]

    def _is_there(self, shard: Shard) -> bool:
        file = self.file(shard)
        if file.is_dir():
            raise ValueError(f"{file}: is a folder, in the place of a shard's file; remove it")
        return file.exists()

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard's file is there and whole; a damaged one is removed. Raises OSError if it cannot be read."""
        if not self._is_there(shard):
            return False
        try:
            self.read(shard)
        except ValueError:
            self.file(shard).unlink(missing_ok=True)
            return False
        return True

    def pending(self, share: Share) -> tuple[list[Shard], int]:
        """Return the shards of a share that are not done, and how many samples the done ones have."""
        shares = shards_of(self.plan)[share.index - 1 :: share.total]
        left = [shard for shard in shares if not self.is_done(shard)]
        return left, sum(s.last - s.first for s in shares) - sum(s.last - s.first for s in left)

    def compute(self, worker: Worker, shard: Shard) -> None:
        """Compute a shard and write its file."""
        rows, seconds, in_engine = worker.compute(shard)
        words = {"noun": worker.task.noun, "adjective": worker.task.adjective, "judge": worker.judge.note}
        times = {"seconds": f"{seconds:.3f}", "engine_seconds": f"{in_engine:.3f}"}
        facts = {"identity": self._name(shard), **words, **times, "processor": worker.processor}
        write_shard(self.file(shard), rows.table(), facts)


@contextmanager
def open_run(path: Path, manifest: dict[str, Any], share: Share) -> Iterator[RunFolder]:
    """Make or resume the folder of a run, which no other driver may use at the time.

    Raises ValueError that names the problem: another run's folder, other files, no permission, another driver.
    """
    prepare_folder(path)
    with _alone(path, share):
        # Listed before the manifest is looked for, which another share may write at this moment.
        other = next((p.name for p in path.iterdir() if not _is_ours(p.name)), None)
        earlier = _read_manifest(path) if (path / MANIFEST).exists() else None
        if earlier is not None and (share.total > 1 or any(path.glob("*.parquet"))):
            _check_same(path, earlier, manifest)  # without shards, another plan may take its place
        elif earlier is None and other:
            raise ValueError(f"{path}: holds other files ({other}); choose an empty folder")
        else:
            with replacing(path / MANIFEST, suffix=f".{os.getpid()}{WRITING}") as file:
                file.write((json.dumps(manifest, indent=2) + "\n").encode())
        if share.total == 1:
            for left in path.glob(f"*{WRITING}"):
                left.unlink(missing_ok=True)  # of a killed run
        yield RunFolder(path, manifest)


@contextmanager
def _alone(path: Path, share: Share) -> Iterator[None]:
    """Lock a folder for a whole run, or for a share: shares of one division run beside each other."""
    if share.total == 1:
        with alone_in(path):
            yield
        return
    with alone_in(path, shared=True), contextlib.ExitStack() as held:
        for other in path.glob("share-*-of-*.lock"):
            if not other.name.endswith(f"-of-{share.total}.lock"):
                held.enter_context(alone_in(other, shared=True))  # of another division: none of its jobs may be at work
        own = path / f"share-{share.index}-of-{share.total}.lock"
        own.touch()
        with alone_in(own):
            yield


def _is_ours(name: str) -> bool:
    return name.endswith((WRITING, ".lock"))


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a run's manifest. Raises ValueError for none, another format, or a plan that was edited."""
    try:
        manifest = read_json(path / MANIFEST, "a manifest")
        Plan.from_dict(manifest["plan"])
        format, expected = manifest["format"], manifest["configuration"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a folder of a run: it has no readable {MANIFEST}") from error
    if format != FORMAT:
        raise ValueError(f"{path / MANIFEST}: format must be {FORMAT}, got {format!r}")
    if (found := _configuration(manifest["plan"])) != expected:
        raise ValueError(f"{path / MANIFEST}: the hash of its plan must be its configuration {expected}, got {found}")
    return manifest


def _check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError, with the names of what differs, unless two manifests are of one run."""
    other = [
        f"{name} {found.get(name)} (now {value})"
        for name, value in expected.items()
        if name not in ("plan", "commit", "configuration") and found.get(name) != value
    ]
    if found.get("configuration") != expected["configuration"]:
        for name, value in expected["plan"].items():
            was = found["plan"].get(name)
            if was != value and name not in ("name", "title", "comparisons"):
                other.append(
                    name if isinstance(value, list) and len(str(value)) > 40 else f"{name} {was} (now {value})"
                )
    if other:
        raise ValueError(f"{path}: holds another run, of {found.get('experiment')}: {', '.join(other)}")
