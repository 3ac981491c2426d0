"""Refinement in resumable chunks: a folder keeps each chunk's samples, images in float32, until the output is written.

A chain's random numbers depend on its id and iteration alone, and a resumed chunk is the same batch, so it ends with
bit-identical samples whatever iteration it continues from.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ipr_fast import checks
from ipr_fast.cli.sampling_options import SamplingArguments
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.content_hash import content_hash
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.outputs import WRITING, alone_in, prepare_folder, replacing, write_json
from ipr_fast.refine import refine_batch
from ipr_fast.sampling.acceptance import Metropolis
from ipr_fast.sampling.policies import MaskPolicy
from ipr_fast.spaces import space_of

SETTINGS = "run.json"
SAVE_EVERY = 60.0  # seconds between saves of an unfinished chunk


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message describes the saved chunks."""


@dataclass(frozen=True)
class ChunkPlan:
    """Division of a run: `count` samples in chunks of `chunk`, `iters` iterations from `first_iteration`."""

    count: int
    chunk: int
    first_iteration: int
    iters: int

    @property
    def last(self) -> int:
        """Number of the last iteration."""
        return self.first_iteration + self.iters - 1

    @property
    def slices(self) -> list[slice]:
        """Samples of each chunk; a single empty chunk without samples."""
        return [slice(first, first + self.chunk) for first in range(0, max(1, self.count), self.chunk)]


class Snapshot(NamedTuple):
    """A chunk's samples (b, ...) after an iteration."""

    iteration: int
    samples: Tensor


class RunFolder:
    """Folder of an unfinished run: the settings that decide its result (JSON values), and one file per saved chunk."""

    def __init__(self, path: Path, settings: dict, plan: ChunkPlan) -> None:
        self.path, self.settings, self.plan = path, settings, plan
        self.saved: dict[int, int] = {}  # chunk: its saved iteration
        self.goes_on = False  # a run that was stopped
        self._run = content_hash(json.dumps(settings, sort_keys=True))

    def save(self, chunk: int, snapshot: Snapshot) -> None:
        """Save a chunk, in place of its earlier snapshot."""
        samples = _unrounded(snapshot.samples.detach()).cpu().numpy()
        with replacing(self._file(chunk)) as file:
            np.savez(file, run=self._run, chunk=chunk, iteration=snapshot.iteration, samples=samples)
        self.saved[chunk] = snapshot.iteration

    def load(self, chunk: int, before: Tensor) -> Snapshot | None:
        """Load a chunk, with samples like `before`; None if its file is missing, damaged or from another run."""
        try:
            with self._file(chunk).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                found = str(stored["run"]), int(stored["chunk"]), stored["samples"].shape
                snapshot = Snapshot(int(stored["iteration"]), torch.from_numpy(stored["samples"]))
        except Exception:  # a damaged file makes numpy raise almost anything
            return None
        is_usable = snapshot.iteration == self.plan.last or bool(torch.isfinite(snapshot.samples).all())
        same_type = snapshot.samples.dtype == before.dtype
        if found != (self._run, chunk, tuple(before.shape)) or not same_type or not is_usable:
            return None
        self.saved[chunk] = snapshot.iteration
        return snapshot

    def check(self) -> None:
        """Raise ValueError unless the folder is empty or of a run with the same settings."""
        path = self.path / SETTINGS
        if not path.exists() and not any(self.path.iterdir()):
            return
        try:
            found = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: holds no readable {SETTINGS}; remove the folder ({error})") from error
        checks.same_settings(self.path, found, self.settings)

    def describe(self) -> str:
        """Describe the saved chunks in words."""
        last = self.plan.last
        done = sum(iteration == last for iteration in self.saved.values())
        unfinished = [f", another up to iteration {i} of {last}" for i in self.saved.values() if i < last]
        return f"{done} of {len(self.plan.slices)} chunks done{''.join(unfinished[:1])}"

    def remove(self) -> None:
        """Remove the run's files, and the folder unless it holds other files."""
        for name in (SETTINGS, "chunk-*.npz"):
            for file in (*self.path.glob(name), *self.path.glob(name + WRITING)):
                file.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def _file(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:06d}.npz"


@contextmanager
def run_folder(path: Path, settings: dict, plan: ChunkPlan, *, resume: bool) -> Iterator[RunFolder]:
    """Create or resume the folder of a run. It is removed when the block succeeds or no chunk was saved.

    Raises ValueError when the folder exists and `resume` is false, when it holds a run of other settings, and when
    another process uses it. Ctrl-C in the block is raised as Interrupted.
    """
    folder, existed = RunFolder(path, settings, plan), path.is_dir()
    prepare_folder(path)
    with alone_in(path):
        if [file.name for file in path.iterdir()] == [SETTINGS + WRITING]:  # killed before it had begun
            (path / (SETTINGS + WRITING)).unlink()
            existed = False
        if existed and not resume:
            raise ValueError(f"{path}: holds an unfinished run; pass --resume to go on with it, or remove the folder")
        folder.goes_on = existed
        if existed:
            folder.check()
        try:
            write_json(path / SETTINGS, settings)
            yield folder
        except BaseException as error:
            has_chunks = any(path.glob("chunk-*.npz"))
            if not has_chunks:
                folder.remove()
            if not isinstance(error, KeyboardInterrupt):
                raise
            hint = f"{folder.describe()}; kept in {path}, --resume goes on" if has_chunks else "nothing was saved"
            raise Interrupted(hint) from None
        folder.remove()


class RefineArguments(SamplingArguments):
    """Keyword arguments of `refine_batch` for all chunks."""

    model: Denoiser | TokenDenoiser
    noise: str
    accept: Metropolis | None


@dataclass
class Tally:
    """What the acceptance of a run did, in the chunks that it ran: see `Acceptance`. asked: samples for the reward."""

    proposed: int = 0
    accepted: int = 0
    asked: int = 0

    def add(self, rule: Metropolis) -> None:
        """Add the last call in which this rule was used."""
        if rule.last is None:  # a call without iterations
            return
        self.proposed += int(rule.last.proposed.sum())
        self.accepted += int(rule.last.accepted.sum())
        self.asked += rule.last.reward_calls * len(rule.last.reward)

    def __str__(self) -> str:
        return f"accepted {self.accepted:,} of {self.proposed:,} proposals; the reward judged {self.asked:,} samples"


def refine_in_chunks(
    x: Tensor,
    mask_fn: MaskPolicy,
    arguments: RefineArguments,
    *,
    folder: RunFolder,
    device: torch.device,
    tally: Tally | None = None,
) -> Tensor:
    """Refine samples (B, ...) on the CPU as `refine_batch` does, a chunk at a time on `device`.

    Follows the plan of `folder`, continuing from its saved chunks. Returns samples of the shape and dtype of x, on the
    CPU; patches that were never selected keep their bits. tally: counts what was accepted.
    """
    plan, before, known = folder.plan, _unrounded(x), arguments["known"]
    space = space_of(arguments["model"])
    complaint = space.complaint("the input", space.check("the input", before))
    if complaint is not None:  # once, for all chunks
        warnings.warn(complaint, contract.RangeWarning, 2)
    if known is not None and known.shape[:1] != x.shape[:1]:
        raise ValueError(f"known must have shape ({len(x)}, ...), got {tuple(known.shape)}")
    chunks: list[RefineArguments] = [
        {**arguments, "chain_ids": arguments["chain_ids"][rows], "known": None if known is None else known[rows]}
        for rows in plan.slices
    ]
    after = torch.empty_like(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", contract.RangeWarning)
        if space.dtype.is_floating_point:
            warnings.simplefilter("ignore", contract.NotFiniteWarning)  # it is told when the samples are written
        for rows, chunk in zip(plan.slices, chunks, strict=True):  # bad arguments fail before any chunk is run
            refine_batch(before[rows].to(device), mask_fn, 0, first_iteration=plan.last + 1, **chunk)
        hidden = not arguments["progress"] or len(chunks) == 1
        for index, rows in enumerate(tqdm(plan.slices, desc="chunks", unit="chunk", disable=hidden)):
            snapshot = folder.load(index, before[rows]) or Snapshot(plan.first_iteration - 1, before[rows])
            if snapshot.iteration < plan.last:
                snapshot = _refine_chunk(folder, index, snapshot, mask_fn, device, chunks[index])
                if tally is not None and arguments["accept"] is not None:
                    tally.add(arguments["accept"])
            after[rows] = snapshot.samples
    return torch.where(after == before, x, after.to(x.dtype))


def _unrounded(x: Tensor) -> Tensor:
    """Return images in float32, and tokens as they are."""
    return x.float() if x.is_floating_point() else x


def _refine_chunk(
    folder: RunFolder,
    index: int,
    snapshot: Snapshot,
    mask_fn: MaskPolicy,
    device: torch.device,
    arguments: RefineArguments,
) -> Snapshot:
    """Refine a chunk from the iteration that it has reached to the last one, and save it.

    With `keep_best` it is saved at its end only: an earlier snapshot would not hold the best samples so far.
    """
    x, first, last = snapshot.samples.to(device), snapshot.iteration + 1, folder.plan.last
    rule = arguments["accept"]
    saver = None if rule is not None and rule.keep_best else _Saver(folder, index)
    try:
        x = refine_batch(x, mask_fn, last + 1 - first, first_iteration=first, callback=saver, **arguments)
        done = Snapshot(last, x.cpu())
        folder.save(index, done)
    except KeyboardInterrupt:
        if saver is not None and saver.last is not None:
            folder.save(index, saver.last)
        raise
    except RuntimeError:
        if saver is not None and saver.error is not None:
            raise saver.error from None
        raise
    return done


class _Saver:
    """Callback of a chunk: keeps its last iteration, and saves it once a minute."""

    def __init__(self, folder: RunFolder, index: int) -> None:
        self.last: Snapshot | None = None
        self.error: OSError | None = None  # of a save
        self._folder, self._index = folder, index
        self._saved = time.monotonic()

    def __call__(self, iteration: int, x: Tensor) -> None:
        self.last = Snapshot(iteration, x)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            try:
                self._folder.save(self._index, self.last)
            except OSError as error:
                self.error = error
                raise
            self._saved = time.monotonic()
