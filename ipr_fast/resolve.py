"""Checks the arguments that `refine_batch` and `generate_batch` share and builds their engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.engine import memory
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graph_cache import Request, runner_for
from ipr_fast.engine.graphs import CudaCapture
from ipr_fast.engine.lanes import LaneSettings
from ipr_fast.engine.patch_lanes import PatchSettings
from ipr_fast.engine.token_lanes import TokenSettings
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import bundled_model_for, load_model
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.condition import Condition
from ipr_fast.sampling.guidance.generation import Generation, Guidance, row_ids
from ipr_fast.sampling.guidance.patch_generation import PatchGeneration
from ipr_fast.sampling.guidance.token_generation import TokenGeneration
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.token_reference import TokenReferenceEngine
from ipr_fast.sampling.tokens import TokenSampling
from ipr_fast.spaces import Space, TokenSpace

BACKENDS = ("auto", "graphs", "torch", "reference")
DEFAULT_MODEL = "digit-sudoku-4x4"
SMALL_BYTES = 2**28  # samples that are not compared with free memory
TABLE_BYTES = 9  # of a number in a schedule's table, while it is made: two of four bytes, and a bool (of tokens fewer)


@dataclass(frozen=True)
class Call:
    """A model's space, its chains and how to run them."""

    space: Space
    chain_ids: Tensor
    sampling: Sampling | TokenSampling
    backend: str
    max_chains: int | str
    tf32: bool
    condition: Condition | None = None

    @contextmanager
    def engine(
        self, values: Tensor, most_active: int, signals: bool = False
    ) -> Iterator[Engine | ReferenceEngine | TokenReferenceEngine]:
        """Provide the engine for values (B, N, ...), of which at most `most_active` are active in a chain.

        signals: keep what the model tells of them.
        """
        model, sampling = self.space.model, self.sampling
        layout = None if self.condition is None else self.condition.layout
        settings: LaneSettings
        reference: type[ReferenceEngine]
        if isinstance(sampling, TokenSampling):
            settings, reference = TokenSettings.of(sampling, self.tf32, layout, signals), TokenReferenceEngine
        else:
            settings, reference = PatchSettings.of(sampling, self.tf32, layout, signals), ReferenceEngine
        if self.backend == "reference":
            yield reference(model, values, self.chain_ids, sampling, self.condition, signals)
            return
        capture = CudaCapture if self.backend == "graphs" else None
        request = Request(
            model,
            len(values),
            most_active,
            values.device,
            settings,
            self.max_chains,
            capture,
            self.condition,
        )
        with runner_for(request) as runner:
            yield Engine(runner, values, self.chain_ids, sampling, self.condition)

    @contextmanager
    def generation(
        self, guidance: Guidance, known: Tensor, free: Tensor, step_bar: Callable[[float], object]
    ) -> Iterator[Generation]:
        """Provide the generation by a guidance of what is free (B, N), from the known values (B, N, ...).

        step_bar: see `Generation`.
        """
        space, sampling, ids = self.space, self.sampling, row_ids(self.chain_ids, guidance.width)
        rows = known.repeat(guidance.width, *(1,) * (known.ndim - 1))
        changed = free.repeat(guidance.width, 1)
        condition = (
            None if self.condition is None else self.condition.map(lambda each: torch.cat([each] * guidance.width))
        )
        with replace(self, chain_ids=ids, condition=condition).engine(rows, int(free.sum(1).max())) as engine:
            shared: dict[str, Any] = {
                "engine": engine,
                "free": free,
                "ids": ids,
                "reward": guidance.reward,
                "to_samples": lambda values: space.to_samples(values, rows, changed),
                "step_bar": step_bar,
            }
            if isinstance(space, TokenSpace):
                assert isinstance(sampling, TokenSampling), "checked by TokenSpace.sampling"
                yield TokenGeneration(known, space.vocabulary.mask_id, sampling, **shared)
            else:
                assert isinstance(sampling, Sampling), "checked by PatchSpace.sampling"
                yield PatchGeneration(known, sampling, **shared)


def model_for(x: Tensor) -> Denoiser | TokenDenoiser:
    """Return the bundled model for samples x, images or int64 tokens, on their device."""
    has_rows = isinstance(x, Tensor) and x.ndim == 2
    if has_rows and x.dtype != torch.int64:
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"x must be images (B, C, H, W) or int64 tokens (B, N), got {dtype} of shape {tuple(x.shape)}")
    shape = (x if has_rows else checks.samples("x", x)).shape[1:]
    return bundled(bundled_model_for(tuple(shape)), x.device)


@lru_cache(maxsize=4)
def bundled(name: str, device: torch.device) -> Denoiser | TokenDenoiser:
    """Load a bundled model; the same object for all calls, so that they find its graphs."""
    return load_model(name, device=device)


def device_for(device: torch.device | str | None, model: object) -> torch.device:
    """Return the device of a generation: the given one, else the model's."""
    if device is not None:
        return checks.usable_device("device", device)
    return contract.device_of(model) or torch.device("cpu")


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


def check_tables(sampling: Sampling | TokenSampling, num_patches: int) -> None:
    """Raise ValueError if the schedule's table, for every number of active patches, does not fit into memory.

    It has N + 1 rows: of N numbers for patches, of a number for each step for tokens.
    """
    of_patches, cpu = isinstance(sampling, Sampling), torch.device("cpu")
    row = num_patches if of_patches else sampling.num_steps(num_patches)
    needed = TABLE_BYTES * row * (num_patches + 1)
    if needed > SMALL_BYTES and needed > memory.available_bytes(cpu):
        what, advice = ("patches", "use larger patches") if of_patches else ("tokens", "use fewer steps")
        raise ValueError(
            f"model: the schedule of {num_patches} {what} takes {memory.binary(needed)} on {cpu}, which has "
            f"{memory.binary(memory.available_bytes(cpu))} left; {advice}"
        )


def check_memory(name: str, count: int, num_bytes: int, device: torch.device) -> None:
    """Raise ValueError if `count` samples of `num_bytes` each, and a working copy, do not fit into memory."""
    needed = 2 * count * num_bytes
    if needed < SMALL_BYTES:
        return
    available = memory.available_bytes(device)
    if needed > available:
        raise ValueError(
            f"{name}: {count} samples take at least {memory.binary(needed)} on {device}, which has "
            f"{memory.binary(available)} left; generate fewer per call, with consecutive chain_ids="
        )
