"""Run a plan in this process, one shard after another, and show how far it is."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from tqdm import tqdm

from ipr_fast.evaluation.scale.folder import RunFolder, Share
from ipr_fast.evaluation.scale.plan import Plan
from ipr_fast.evaluation.scale.shards import Shard, Worker
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import load_model, model_info
from ipr_fast.models.token_denoiser import TokenDenoiser


def load_planned(plan: Plan, device: torch.device, dtype: str) -> Denoiser | TokenDenoiser:
    """Load the model of a plan. Raises ValueError if there is none.

    The plan's `config` is that of a published checkpoint: a file with a configuration of its own keeps it.
    """
    published = plan.config is not None and model_info(plan.model)["sample_shape"] is None
    return load_model(plan.model, config=plan.config if published else None, device=device, dtype=getattr(torch, dtype))


def run_in_process(folder: RunFolder, worker: Worker, share: Share, *, progress: bool = False) -> None:
    """Compute the shards of a share that are not done."""
    left, samples_done = folder.pending(share)
    with ShardBar(folder, left, samples_done, progress) as bar:
        for shard in left:
            folder.compute(worker, shard)
            bar.finished(shard)


class ShardBar:
    """A progress bar over samples, with those of finished shards counted in, samples a second and the time left."""

    def __init__(self, folder: RunFolder, left: list[Shard], samples_done: int, shown: bool) -> None:
        total = samples_done + sum(shard.last - shard.first for shard in left)
        self._bar = tqdm(
            total=total,
            initial=samples_done,
            desc=f"{folder.plan.name}, {len(left)} shards left",
            unit="sample",
            disable=not shown,
        )
        self._name, self._left, self.begun = folder.plan.name, len(left), time.monotonic()

    def finished(self, shard: Shard) -> None:
        """Count a finished shard."""
        self._left -= 1
        self._bar.set_description(f"{self._name}, {self._left} shards left", refresh=False)
        self._bar.update(shard.last - shard.first)

    def __enter__(self) -> ShardBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
