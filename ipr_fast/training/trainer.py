"""The state of a training run (model, optimiser, moving average), its settings and its step.

Data, noise, network, optimiser and moving average are on one device. The first step checks the samples' values; later
steps never read data on the host. All randomness of step k comes from a generator seeded by (seed, k). So a run with a
fixed number of steps, killed and resumed on a CPU, ends with the weights of an uninterrupted one. This does not hold
for runs with a time limit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ipr_fast import checks
from ipr_fast.errors import first_line
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.outputs import replacing
from ipr_fast.tasks.base import ReadableTask, Task
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import TrainedConfig, TrainedModel, config_of, initialise, make_network
from ipr_fast.training.optimizers import OPTIMIZERS, make_optimizers
from ipr_fast.training.own_patches import OwnPatches, make_own_patches
from ipr_fast.training.patch_objective import PatchObjective
from ipr_fast.training.token_objective import TokenObjective

DTYPES = ("float32", "tf32", "bfloat16")
LONGEST_WARMUP = 0.05  # share of the run
END = ("steps", "minutes")
MAY_CHANGE = ("save_every", "compile", *END)  # when a run is resumed


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run, which ends after `steps` or `minutes`, whichever comes first.

    steps >= 1, minutes > 0: either may be None for no limit, not both.
    batch_size >= 1.
    learning_rate > 0: reached after `warmup` >= 0 steps or a twentieth of the run, whichever is earlier; falls to 0 as
        a cosine over the last half of the run.
    weight_decay >= 0, ema_decay in [0, 1), clip_norm > 0 (the largest gradient norm).
    save_every >= 1: steps between checkpoints; a killed run loses at most these, and at most a minute.
    dtype: of matrix products and attention: "float32", "tf32" (10 mantissa bits, on a GPU only; elsewhere float32) or
        "bfloat16" (7 bits). Weights, losses and optimiser are float32.
    optimizer: "adamw", or "muon" for the layers' matrices and AdamW for the rest.
    symbol_weight >= 0: of the cross-entropy of symbols, for a `SymbolTask`; 0 trains without a symbol head.
    mean_weight >= 0: of the error of a sample's mean, for tasks that count (`mean_error` in objective.py).
    few_active in [0, 1]: share of samples with more context than usual, likewise (`sample_roles` in objective.py).
    own_patches in [0, 1]: share of samples in which some clean patches are ones that the model which the run starts
        from has made (own_patches.py), for a `ReadableTask`.
    compile: fuse network and losses with torch.compile; the first step, which compiles, does not count as minutes.
    seed in 0..2**64-1.

    Other values are a ValueError. A resumed run may get another end, and from then on has the learning rate of a run
    with that end: after a finished run it rises from 0 at once, to its full value if the run becomes twice as long.
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
    optimizer: str = "adamw"
    symbol_weight: float = 0.5
    mean_weight: float = 0.0
    few_active: float = 0.0
    own_patches: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, float] = {}  # Python's numbers in place of NumPy's
        for name in ("batch_size", "save_every"):
            plain[name] = checks.integer(name, getattr(self, name), 1)
        if self.steps is not None:
            plain["steps"] = checks.integer("steps", self.steps, 1)
        elif self.minutes is None:
            raise ValueError("steps and minutes must not both be None: the run would have no end")
        for name in ("learning_rate", "clip_norm", "minutes"):
            value = getattr(self, name)
            if value is None and name == "minutes":
                continue
            plain[name] = checks.number(name, value, 0)
            if not plain[name] > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("weight_decay", "symbol_weight", "mean_weight"):
            plain[name] = checks.number(name, getattr(self, name), 0)
        for name in ("few_active", "own_patches", "ema_decay"):
            plain[name] = checks.number(name, getattr(self, name), 0, 1)
        if not plain["ema_decay"] < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        plain["warmup"] = checks.integer("warmup", self.warmup, 0)
        plain["seed"] = checks.integer("seed", self.seed, 0, 2**64 - 1)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        checks.boolean("compile", self.compile)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, >= 1 at its end."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(by_steps, by_time)

    def rate(self, step: int, seconds: float) -> float:
        """Return the learning rate: linear warm-up, constant, then a cosine to 0 over the last half of the run."""
        progress = self.progress(step, seconds)
        warm = min(1.0, max((step + 1) / max(1, self.warmup), progress / LONGEST_WARMUP))
        late = min(max(0.0, 2 * progress - 1), 1.0)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * late))


class Trainer:
    """Model, optimiser and moving average of a run after `step` steps and `seconds` of training.

    config: of the network (default: the task's). init: a model of this configuration, whose weights a new run starts
    from; `begin` has it make its own patches, if the run trains with them.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        device: torch.device | str = "cpu",
        *,
        config: TrainedConfig | None = None,
        init: nn.Module | None = None,
    ) -> None:
        self.task, self.settings, self.device = task, settings, checks.usable_device("device", device)
        name = getattr(task, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"task must have a name, a str that is not empty, got {name!r:.80}")
        with torch.random.fork_rng(), torch.device("cpu"):  # the same weights whatever torch's default device is
            torch.manual_seed(settings.seed)
            model = make_network(config_of(task) if config is None else config)
            initialise(task, model, init)
            self.objective = make_objective(task, model, settings)
        self.model = model.to(self.device).train()
        self.symbol_head = None if self.objective.head is None else self.objective.head.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(
            settings.optimizer,
            self.model,
            self.symbol_head,
            rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.step, self.seconds = 0, 0.0
        self._starts_from_model = init is not None
        self._losses = torch.compile(self._compute_losses) if settings.compile else self._compute_losses
        self._generator = torch.Generator(self.device)

    def makers_of_own_patches(self) -> tuple[PatchTransformer, ReadableTask] | None:
        """Return the model that makes its own patches for a new run and the task that reads them, None without them.

        Raises ValueError for a run that starts from no model, and for a task that cannot read symbols.
        """
        if not self.settings.own_patches:
            return None
        if not isinstance(self.ema, PatchTransformer) or not self._starts_from_model:
            raise ValueError("own_patches: needs a model of patches (init) whose weights the run starts from")
        if not isinstance(self.task, ReadableTask):
            raise ValueError(
                f"own_patches must be 0 for task {self.task.name}, which cannot read the symbols of samples"
            )
        return self.ema, self.task

    def begin(self, *, progress: bool = False) -> None:
        """Let the model make its own patches, if a new run trains with them: minutes on a CPU. Once is enough."""
        if self.step or self.objective.own is not None:
            return
        makers = self.makers_of_own_patches()
        if makers is not None:
            self.objective.own = make_own_patches(*makers, self.settings.seed, progress=progress)

    def train_step(self) -> Any:
        """Draw a batch, step the optimiser, update the moving average; return the batch's losses, a NamedTuple."""
        self.begin()
        self._generator.manual_seed(self._seed())
        losses = self._losses(self.objective.draw(self.settings.batch_size, self._generator))
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.objective.total(losses).backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.settings.clip_norm)
        for group in groups:
            group["lr"] = self.settings.rate(self.step, self.seconds)
        with interrupts_held():  # keep optimisers, step and EMA consistent for the checkpoint
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            self._update_ema()
        return losses

    @property
    def is_done(self) -> bool:
        return self.settings.progress(self.step, self.seconds) >= 1

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: a crash leaves the previous one or this one.

        Raises FloatingPointError for weights that are not finite, OSError when the file cannot be written.
        """
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "task": self.task.name,
            "config": json.dumps(self.model.config.to_dict()),
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "symbol_head": None if self.symbol_head is None else self.symbol_head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "own_patches": None if self.objective.own is None else self.objective.own._asdict(),
        }
        if not self._is_finite():
            raise FloatingPointError(f"the weights are not finite at step {self.step}")
        with replacing(path) as file:
            torch.save(state, file)

    def restore(self, path: Path) -> None:
        """Load a checkpoint, to continue until the end that the settings name.

        Raises ValueError for a checkpoint of another task, network or settings, for weights that are not finite, and
        for a new end that is not after the steps and minutes already done.
        """
        state = read_checkpoint(path, self.device)
        self._check_same_run(path, state)
        self._check_end(path, state)
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            if self.symbol_head is not None:
                self.symbol_head.load_state_dict(state["symbol_head"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if self.settings.own_patches:
                self.objective.own = OwnPatches(**state["own_patches"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its state does not fit the model ({first_line(error)})") from error
        if not self._is_finite():
            raise ValueError(f"{path}: its weights are not finite")
        self.step, self.seconds = state["step"], state["seconds"]

    def _check_same_run(self, path: Path, state: dict) -> None:
        older = asdict(TrainSettings())  # for settings that a checkpoint of an older version lacks
        found = {"task": state.get("task"), **state["config"], **older, **state["settings"]}
        mine = {"task": self.task.name, **json.loads(json.dumps(self.model.config.to_dict())), **asdict(self.settings)}
        checks.same_settings(path, found, {name: value for name, value in mine.items() if name not in MAY_CHANGE})

    def _check_end(self, path: Path, state: dict) -> None:
        end, before = (
            {name: settings.get(name) for name in END} for settings in (asdict(self.settings), state["settings"])
        )
        if end != before and self.settings.progress(state["step"], state["seconds"]) >= 1:
            raise ValueError(
                f"{path}: the run has done {state['step']} steps in {state['seconds'] / 60:.3g} minutes and must end "
                f"after that, got steps {end['steps']} and minutes {end['minutes']}"
            )

    def _is_finite(self) -> bool:
        return all(torch.isfinite(weight).all() for weight in (*self.model.parameters(), *self.ema.parameters()))

    def _compute_losses(self, batch: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            return self.objective.losses(batch)

    def _seed(self) -> int:
        digest = hashlib.sha256(f"{self.settings.seed}:{self.step}".encode()).digest()
        return int.from_bytes(digest[:7])

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)


def make_objective(task: Task, model: TrainedModel, settings: TrainSettings) -> PatchObjective | TokenObjective:
    """Make the objective of a model, and its head, on the CPU.

    Raises ValueError for a `mean_weight` of tokens, which have no mean.
    """
    if isinstance(model, TokenTransformer):
        if settings.mean_weight:
            raise ValueError(
                f"mean_weight must be 0 for task {task.name}, whose samples are tokens, got {settings.mean_weight}"
            )
        return TokenObjective(task, model, settings.few_active)
    return PatchObjective(
        task,
        model,
        settings.symbol_weight,
        settings.mean_weight,
        settings.few_active,
        settings.own_patches,
    )


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay a Ctrl-C to the end of the block, for short blocks that must not be left half done.

    Only the main thread gets a Ctrl-C; a handler that is not Python's stays as it is.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])
