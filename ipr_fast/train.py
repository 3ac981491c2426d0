"""Training a PatchTransformer as a sequential diffusion model.

Everything random in step k comes from a generator seeded by (seed, k). So a run that was killed and resumed ends with
the weights of one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ipr_fast.files import prepare_folder, replace_durably
from ipr_fast.models.checkpoints import save_model
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.objective import Losses, compute_losses
from ipr_fast.tasks.base import Task

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    steps, batch_size, save_every >= 1; a killed run loses at most `save_every` steps. learning_rate > 0, reached after
    `warmup` >= 0 steps, falls to 0 as a cosine over the last half. weight_decay >= 0; clip_norm > 0, the gradient's
    largest norm; ema_decay in [0, 1). Anything else is a ValueError.
    """

    steps: int = 8_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


class Trainer:
    """Model, optimiser and moving average of one run, at a step; saved and restored whole."""

    def __init__(self, task: Task, settings: TrainSettings, device: torch.device | str = "cpu") -> None:
        self.task, self.settings, self.device = task, settings, torch.device(device)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model = PatchTransformer(task.config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.step = 0

    def train_step(self) -> Losses:
        """One step: draw a batch, descend, update the moving average; returns the batch's losses."""
        generator = self._generator()
        clean = self.model.grid.to_patches(self.task.sample(self.settings.batch_size, generator)).to(self.device)
        losses = compute_losses(self.model, clean, generator)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._rate()
        self.optimizer.step()
        self.step += 1
        self._update_ema()
        return losses

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash at any moment leaves the previous one or this one, whole."""
        state = {
            "step": self.step,
            "task": self.task.name,
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        replace_durably(partial, path)

    def restore(self, path: Path) -> None:
        """Go on where the checkpoint stands. Raises ValueError when it is of another task or other settings."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            step, task, settings = int(state["step"]), state["task"], dict(state["settings"])
        except Exception as error:  # a foreign file makes the loader raise almost anything
            raise ValueError(f"{path}: not a readable checkpoint ({error!r})") from error
        mine = asdict(self.settings)
        other = [name for name in mine if name != "save_every" and settings.get(name) != mine[name]]
        if task != self.task.name or other:
            described = ", ".join(f"{name} {settings.get(name)} (now {mine[name]})" for name in other)
            raise ValueError(f"{path}: a run of other settings: task {task} (now {self.task.name}) {described}")
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its state does not fit the model ({error!r})") from error
        self.step = step

    def _generator(self) -> torch.Generator:
        digest = hashlib.sha256(f"{self.settings.seed}:{self.step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def _rate(self) -> float:
        """The share of the learning rate: linear warm-up, constant, then a cosine to 0 over the last half."""
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        late = max(0.0, 2 * self.step / self.settings.steps - 1)
        return warm * 0.5 * (1 + math.cos(math.pi * late))

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(value, 1 - decay)


def train(
    task: Task,
    settings: TrainSettings,
    out: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Train a model of `task` in the folder `out` and return the path of its weights (the moving average).

    `out` gets checkpoint.pt every `save_every` steps, log.jsonl and, in the end, model.safetensors. A folder that holds
    a checkpoint is gone on with when `resume` is true, else a ValueError.
    """
    out = Path(out)
    trainer = Trainer(task, settings, device)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        if not resume:
            raise ValueError(f"out: {checkpoint} exists; resume that run or choose another folder")
        trainer.restore(checkpoint)
    prepare_folder(out)
    _cut_log(out / LOG, trainer.step)
    bar = tqdm(total=settings.steps, initial=trainer.step, disable=not progress, unit="step", smoothing=0.05)
    with bar, (out / LOG).open("a") as log:
        for entry in _run(trainer, checkpoint, bar):
            log.write(json.dumps(entry) + "\n")
            log.flush()
    description = {"task": task.name, "training": json.dumps(asdict(settings))}
    save_model(trainer.ema, out / MODEL, **description)
    return out / MODEL


def _cut_log(path: Path, step: int) -> None:
    """Drop what the log says of later steps than the run goes on from, and a last line that was cut off."""
    lines = path.read_text().splitlines() if path.exists() and step else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))


def _run(trainer: Trainer, checkpoint: Path, bar: tqdm) -> Iterator[dict]:
    """Train to the end, saving on the way; yields the mean losses since the last entry, every 50 steps."""
    settings, begun, recent = trainer.settings, time.monotonic(), []
    while trainer.step < settings.steps:
        losses = trainer.train_step()
        recent.append(torch.stack([losses.velocity, losses.log_variance, losses.mix]).detach())
        bar.update()
        if trainer.step % 50 == 0 or trainer.step == settings.steps:
            velocity, log_variance, mix = torch.stack(recent).mean(0).tolist()
            if not math.isfinite(velocity + log_variance + mix):
                raise FloatingPointError(f"the loss is not finite at step {trainer.step}")
            recent.clear()
            bar.set_postfix(velocity=f"{velocity:.4f}", log_variance=f"{log_variance:.3f}", mix=f"{mix:.3f}")
            yield {
                "step": trainer.step,
                "velocity": velocity,
                "log_variance": log_variance,
                "mix": mix,
                "seconds": round(time.monotonic() - begun, 1),
            }
        if trainer.step % settings.save_every == 0 or trainer.step == settings.steps:
            trainer.save(checkpoint)
