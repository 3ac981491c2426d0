"""Training a PatchTransformer as a sequential diffusion model.

Everything happens on one device: data, noise, network, optimiser, moving average; the host looks at a loss once in
LOG_EVERY steps. Everything random in step k comes from a generator seeded by (seed, k). So a run of so many steps that
was killed and resumed on a CPU ends with the weights of one that was not; where minutes end it, the clock has a say.
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
from torch import Tensor
from tqdm import tqdm

from ipr_fast.files import prepare_folder, replace_durably
from ipr_fast.models.checkpoints import save_model
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.objective import Draw, Losses, compute_losses, draw
from ipr_fast.precision import float32_products
from ipr_fast.rates import product_rate, training_flops
from ipr_fast.tasks.base import Task

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
LOG = "log.jsonl"
LOG_EVERY = 50
DTYPES = ("float32", "tf32", "bfloat16")
MAY_CHANGE = ("save_every", "compile")  # between a run and its resumption


@dataclass(frozen=True)
class TrainSettings:
    """How to train, and when to end: after `steps`, or `minutes` of training, whichever comes first.

    steps, batch_size, save_every >= 1; a killed run loses at most `save_every` steps. minutes > 0. One of steps and
    minutes may be None, for no such end. learning_rate > 0, reached after `warmup` >= 0 steps, falls to 0 as a cosine
    over the last half of the run. weight_decay >= 0; clip_norm > 0, the gradient's largest norm; ema_decay in [0, 1).
    dtype: of products and attention: "float32", "tf32" (that of a GPU, with ten bits of mantissa; elsewhere float32) or
    "bfloat16" (seven); weights, losses and optimiser are float32. compile: let torch.compile fuse the network and its
    losses. Anything else is a ValueError.
    """

    steps: int | None = 8_000
    minutes: float | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    save_every: int = 500
    dtype: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            value = getattr(self, name)
            if not (value is None and name == "steps") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes must not both be None: the run would have no end")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name in ("learning_rate", "clip_norm", "minutes"):
            value = getattr(self, name)
            if not (value is None and name == "minutes") and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over: at least 1 when it has ended."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(by_steps, by_time)

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate: a linear warm-up, constant, then a cosine to 0 over the last half of the run."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        late = min(max(0.0, 2 * self.progress(step, seconds) - 1), 1.0)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * late))


class Trainer:
    """Model, optimiser and moving average of one run after `step` steps, in `seconds`; saved and restored whole."""

    def __init__(self, task: Task, settings: TrainSettings, device: torch.device | str = "cpu") -> None:
        self.task, self.settings, self.device = task, settings, torch.device(device)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            model = PatchTransformer(task.config)
            task.initialise(model)
        self.model = model.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.step, self.seconds = 0, 0.0
        self._losses = torch.compile(self._compute_losses) if settings.compile else self._compute_losses
        self._generator = torch.Generator(self.device)

    def train_step(self) -> Losses:
        """One step: draw a batch, descend, update the moving average; returns the batch's losses."""
        self._generator.manual_seed(self._seed())
        clean = self.model.grid.to_patches(self.task.sample(self.settings.batch_size, self._generator))
        losses = self._losses(clean, draw(clean.shape, self._generator))
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step, self.seconds)
        self.optimizer.step()
        self.step += 1
        self._update_ema()
        return losses

    @property
    def is_done(self) -> bool:
        return self.settings.progress(self.step, self.seconds) >= 1

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash at any moment leaves the previous one or this one, whole."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
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
            step, seconds = int(state["step"]), float(state["seconds"])
            task, settings = state["task"], dict(state["settings"])
        except Exception as error:  # a foreign file makes the loader raise almost anything
            raise ValueError(f"{path}: not a readable checkpoint ({error!r})") from error
        mine = asdict(self.settings)
        other = [name for name in mine if name not in MAY_CHANGE and settings.get(name) != mine[name]]
        if task != self.task.name or other:
            described = ", ".join(f"{name} {settings.get(name)} (now {mine[name]})" for name in other)
            raise ValueError(f"{path}: a run of other settings: task {task} (now {self.task.name}) {described}")
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its state does not fit the model ({error!r})") from error
        self.step, self.seconds = step, seconds

    def _compute_losses(self, clean: Tensor, drawn: Draw) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            return compute_losses(self.model.predict, clean, drawn)

    def _seed(self) -> int:
        digest = hashlib.sha256(f"{self.settings.seed}:{self.step}".encode()).digest()
        return int.from_bytes(digest[:7])

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)


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
    products = float32_products(trainer.device, settings.dtype == "tf32")
    with products, _Bar(trainer, progress) as bar, (out / LOG).open("a") as log:
        for entry in _run(trainer, checkpoint, bar):
            log.write(json.dumps(entry) + "\n")
            log.flush()
    description = {"task": task.name, "training": json.dumps({**asdict(settings), "trained_steps": trainer.step})}
    save_model(trainer.ema, out / MODEL, **description)
    return out / MODEL


def _cut_log(path: Path, step: int) -> None:
    """Drop what the log says of later steps than the run goes on from, and a last line that was cut off."""
    lines = path.read_text().splitlines() if path.exists() and step else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))


def _run(trainer: Trainer, checkpoint: Path, bar: _Bar) -> Iterator[dict]:
    """Train to the end, saving on the way; yields the mean losses since the last entry, every LOG_EVERY steps."""
    speed, recent = Speed(trainer), []
    begun = time.monotonic() - trainer.seconds
    while not trainer.is_done:
        losses = trainer.train_step()
        recent.append(torch.stack([losses.velocity, losses.log_variance, losses.mix]).detach())
        trainer.seconds = time.monotonic() - begun
        bar.update()
        if trainer.step % LOG_EVERY == 0 or trainer.is_done:
            velocity, log_variance, mix = torch.stack(recent).mean(0).tolist()  # waits for the device
            if not math.isfinite(velocity + log_variance + mix):
                raise FloatingPointError(f"the loss is not finite at step {trainer.step}")
            trainer.seconds = time.monotonic() - begun
            entry = {"step": trainer.step, "velocity": velocity, "log_variance": log_variance, "mix": mix}
            entry |= {"seconds": round(trainer.seconds, 1)} | speed.since_last(len(recent))
            recent.clear()
            bar.tell(entry)
            yield entry
        if trainer.step % trainer.settings.save_every == 0 or trainer.is_done:
            trainer.save(checkpoint)


class Speed:
    """Samples a second of a run, and its share of the rate at which its device multiplies matrices."""

    def __init__(self, trainer: Trainer) -> None:
        self._batch = trainer.settings.batch_size
        grid = trainer.model.grid
        self._flops = training_flops(trainer.model, (grid.num_patches, grid.patch_numel))
        dtype = torch.bfloat16 if trainer.settings.dtype == "bfloat16" else torch.float32
        self._most = product_rate(trainer.device, dtype)
        self._last = time.monotonic()

    def since_last(self, steps: int) -> dict[str, float]:
        """Over the steps since the last call, saving included."""
        now = time.monotonic()
        rate = steps * self._batch / (now - self._last)
        self._last = now
        return {"samples_per_second": round(rate, 1), "share_of_peak": round(rate * self._flops / self._most, 3)}


class _Bar:
    """The progress of a run, in steps or, where minutes end it, in seconds."""

    def __init__(self, trainer: Trainer, shown: bool) -> None:
        self._trainer, settings = trainer, trainer.settings
        self._by_time = settings.steps is None
        total = round(60 * settings.minutes) if self._by_time else settings.steps
        self._bar = tqdm(
            total=total, initial=self._now(), disable=not shown, unit="s" if self._by_time else "step", smoothing=0.05
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        self._bar.update(min(self._now(), self._bar.total) - self._bar.n)

    def tell(self, entry: dict) -> None:
        self._bar.set_postfix_str(
            f"step {entry['step']}, velocity {entry['velocity']:.4f}, log-variance {entry['log_variance']:.3f}, "
            f"mix {entry['mix']:.3f}, {entry['samples_per_second']:,.0f} samples/s, "
            f"{entry['share_of_peak']:.0%} of peak"
        )

    def _now(self) -> int:
        return int(self._trainer.seconds) if self._by_time else self._trainer.step
