"""Checks the arguments that `refine_batch` and `generate_batch` share and builds their engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.engine import memory
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graph_cache import Request, runner_for
from ipr_fast.engine.graphs import CudaCapture
from ipr_fast.engine.patch_lanes import PatchSettings
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import bundled_model_for, load_model
from ipr_fast.sampling import arguments
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.schedule import Sampling

BACKENDS = ("auto", "graphs", "torch", "reference")
DEFAULT_MODEL = "digit-sudoku-4x4"
MOST_TEMPERATURE = 1000.0  # far more noise than any model was trained on; beyond, its float32 overflows
SMALL_BYTES = 2**28  # samples that are not compared with free memory


@dataclass(frozen=True)
class Call:
    """A model, its chains and how to run them."""

    model: Denoiser
    chain_ids: Tensor
    sampling: Sampling
    backend: str
    max_chains: int | str
    tf32: bool

    @contextmanager
    def engine(self, patches: Tensor, most_active: int) -> Iterator[Engine | ReferenceEngine]:
        """Provide the engine for patches (B, N, P), of which at most `most_active` are active in a chain."""
        if self.backend == "reference":
            yield ReferenceEngine(self.model, patches, self.chain_ids, self.sampling)
            return
        capture = CudaCapture if self.backend == "graphs" else None
        settings = PatchSettings.of(self.sampling, self.tf32)
        request = Request(self.model, len(patches), most_active, patches.device, settings, self.max_chains, capture)
        with runner_for(request) as runner:
            yield Engine(runner, patches, self.chain_ids, self.sampling)


def model_for(x: Tensor) -> Denoiser:
    """Return the bundled model for samples x, on their device."""
    return bundled(bundled_model_for(tuple(x.shape[1:])), x.device)


@lru_cache(maxsize=4)
def bundled(name: str, device: torch.device) -> Denoiser:
    """Load a bundled model; the same object for all calls, so that they find its graphs."""
    return load_model(name, device=device)


def device_for(device: torch.device | str | None, model: Denoiser) -> torch.device:
    """Return the device of a generation: the given one, else the model's."""
    if device is not None:
        return checks.usable_device("device", device)
    return contract.device_of(model) or torch.device("cpu")


def sampling(
    schedule: object, stochasticity: float, temperature: float, seed: int, fixed_noise: bool = False
) -> Sampling:
    return Sampling(
        arguments.schedule(schedule),
        checks.number("stochasticity", stochasticity, 0, 1),
        checks.number("temperature", temperature, 0, MOST_TEMPERATURE),
        checks.integer("seed", seed, 0, 2**64 - 1),
        fixed_noise,
    )


def backend_on(device: torch.device, name: object) -> str:
    """Return the backend, with "auto" resolved."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    if name == "graphs" and device.type != "cuda":
        raise ValueError(f'backend "graphs" needs the samples on a CUDA device, got {device}')
    if name == "auto":
        return "graphs" if device.type == "cuda" else "torch"
    return name


def chains_at_a_time(max_chains: object) -> int | str:
    if isinstance(max_chains, str) and max_chains == "auto":
        return max_chains
    try:
        return checks.integer("max_chains", max_chains, 1)
    except ValueError as error:
        raise ValueError(f'max_chains must be "auto" or an int >= 1, got {max_chains!r}') from error


def check_memory(name: str, count: int, numel: int, device: torch.device) -> None:
    """Raise ValueError if `count` samples of `numel` float32 numbers, and a working copy, do not fit into memory."""
    needed = 2 * 4 * count * numel
    if needed < SMALL_BYTES:
        return
    available = memory.available_bytes(device)
    if needed > available:
        raise ValueError(
            f"{name}: {count} samples take at least {memory.binary(needed)} on {device}, which has "
            f"{memory.binary(available)} left; generate fewer per call, with consecutive chain_ids="
        )
