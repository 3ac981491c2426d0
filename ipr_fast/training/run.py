"""A training run in a folder: checkpoints, log, progress bar, final weights, Ctrl-C and resumption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ipr_fast.engine.precision import float32_products
from ipr_fast.models.files.checkpoints import save_model
from ipr_fast.outputs import alone_in, prepare_folder, replacing
from ipr_fast.tasks.base import Task
from ipr_fast.training.configs import TrainedConfig
from ipr_fast.training.recipe import recipe_names, result_files
from ipr_fast.training.throughput import product_rate, training_flops
from ipr_fast.training.trainer import Trainer, TrainSettings

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
LOG = "log.jsonl"
EVALUATION = "evaluation.json"
LOG_EVERY = 50, 10.0  # steps or seconds; only then does the host synchronise
SAVE_EVERY = 60.0  # seconds at most


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    task: Task,
    settings: TrainSettings,
    out: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    config: TrainedConfig | None = None,
    init: nn.Module | None = None,
    progress: bool = True,
) -> Path:
    """Train a model of `task` in the folder `out` and return the path of its weights (the moving average).

    Writes checkpoint.pt every `save_every` steps and once a minute, log.jsonl, and model.safetensors at the end.
    resume: continue from the checkpoint in `out`, if there is one. config: of the network (default: the task's).
    init: a model of this configuration whose weights the run starts from, unless it resumes. A run that goes on removes
    what `ipr-fast train` has made of its earlier weights: evaluation.json, and a recipe's model and quality-NAME.json.

    Raises ValueError for an `init` that does not fit, if `out` holds a checkpoint and `resume` is false, if it holds
    weights without a checkpoint, and if another process trains there. After a Ctrl-C it saves the last finished step,
    unless a second Ctrl-C comes, and raises KeyboardInterrupt.
    """
    out = Path(out)
    trainer = Trainer(task, settings, device, config=config, init=init)
    checkpoint, model = out / CHECKPOINT, out / MODEL
    if not checkpoint.exists():
        trainer.makers_of_own_patches()  # before there is a folder
    prepare_folder(out)
    with alone_in(out):
        if checkpoint.exists():
            if not resume:
                raise ValueError(f"out: {checkpoint} exists; resume that run or choose another folder")
            trainer.restore(checkpoint)
        elif model.exists():
            raise ValueError(f"out: {model} exists, without a checkpoint to go on from; choose another folder")
        trainer.begin(progress=progress)
        (out / EVALUATION).unlink(missing_ok=True)  # it describes earlier weights
        if trainer.step and not trainer.is_done:
            for path in (path for name in recipe_names() for path in result_files(out, name)):
                path.unlink(missing_ok=True)
        _cut_log(out / LOG, trainer.step)
        products = float32_products(trainer.device, settings.dtype == "tf32")
        with products, _Bar(trainer, progress) as bar:
            try:
                for entry in _run(trainer, checkpoint, bar):
                    _append(out / LOG, entry)
            except KeyboardInterrupt:
                trainer.save(checkpoint)
                raise
        described = json.dumps({**asdict(settings), "trained_steps": trainer.step})
        save_model(trainer.ema, model, task=task.name, training=described)
    return model


def _cut_log(path: Path, step: int) -> None:
    """Keep the log's entries up to a step; drop later and unreadable lines."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() and step else []
    kept = "".join(f"{line}\n" for line in lines if 0 < _step_of(line) <= step)
    with replacing(path) as file:
        file.write(kept.encode())


def _append(path: Path, entry: dict) -> None:
    """Append a line to the log; an OSError names the path, which Python's own on a full disk does not."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0


def _run(trainer: Trainer, checkpoint: Path, bar: _Bar) -> Iterator[dict]:
    """Train to the end and save checkpoints; yield an entry for the log, with mean losses, every LOG_EVERY."""
    speed = Speed(trainer)
    recent: list[torch.Tensor] = []  # losses since the last entry
    begun, compiles = time.monotonic() - trainer.seconds, trainer.settings.compile
    logged = saved = trainer.seconds
    while not trainer.is_done:
        losses = trainer.train_step()
        if compiles:  # the first step does not count
            begun, compiles = time.monotonic() - trainer.seconds, False
            speed.restart(untimed=1)
        recent.append(torch.stack([*losses]).detach())
        trainer.seconds = time.monotonic() - begun
        bar.update()
        if trainer.step % LOG_EVERY[0] == 0 or trainer.seconds - logged > LOG_EVERY[1] or trainer.is_done:
            means = dict(zip(losses._fields, torch.stack(recent).mean(0).tolist(), strict=True))  # synchronises
            if not math.isfinite(sum(means.values())):
                raise FloatingPointError(f"the loss is not finite at step {trainer.step}")
            logged = trainer.seconds = time.monotonic() - begun
            entry = {"step": trainer.step, **means}
            entry |= {"seconds": round(trainer.seconds, 1)} | speed.since_last(len(recent))
            recent.clear()
            bar.show(entry)
            yield entry
        is_due = trainer.step % trainer.settings.save_every == 0 or trainer.seconds - saved > SAVE_EVERY
        if is_due or trainer.is_done:
            trainer.save(checkpoint)
            saved = trainer.seconds


class Speed:
    """Samples per second of a run, and its share of the device's peak rate of matrix products."""

    def __init__(self, trainer: Trainer) -> None:
        self._batch = trainer.settings.batch_size
        self._flops = training_flops(trainer.model)
        dtype = torch.bfloat16 if trainer.settings.dtype == "bfloat16" else torch.float32
        self._peak = product_rate(trainer.device, dtype)
        self.restart()

    def restart(self, untimed: int = 0) -> None:
        """Measure from now on; `untimed` of the next call's steps were before."""
        self._last, self._untimed = time.monotonic(), untimed

    def since_last(self, steps: int) -> dict[str, float]:
        """Return the speed over the steps since the last call, saving included; 0 if none was timed."""
        timed, now = steps - self._untimed, time.monotonic()
        rate = timed * self._batch / (now - self._last) if timed else 0.0
        self.restart()
        return {"samples_per_second": round(rate, 1), "share_of_peak": float(f"{rate * self._flops / self._peak:.3g}")}


class _Bar:
    """Progress bar of a run, in steps, or in seconds where only minutes end it."""

    def __init__(self, trainer: Trainer, shown: bool) -> None:
        self._trainer, steps, minutes = trainer, trainer.settings.steps, trainer.settings.minutes
        self._by_time = steps is None
        self._total = round(60 * (minutes or 0)) if steps is None else steps
        unit = "s" if self._by_time else "step"
        self._bar = tqdm(total=self._total, initial=self._now(), disable=not shown, unit=unit, smoothing=0.05)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        self._bar.update(min(self._now(), self._total) - self._bar.n)

    def show(self, entry: dict) -> None:
        names = self._trainer.objective.losses_type._fields
        losses = ", ".join(f"{name.replace('_', '-')} {entry[name]:.4f}" for name in names if entry[name])
        self._bar.set_postfix_str(
            f"step {entry['step']}, {losses}, {entry['samples_per_second']:,.0f} samples/s, "
            f"{entry['share_of_peak']:.0%} of peak"
        )

    def _now(self) -> int:
        return int(self._trainer.seconds) if self._by_time else self._trainer.step
