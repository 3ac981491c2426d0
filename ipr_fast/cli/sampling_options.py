"""How samples are generated: the options of `generate` and `refine`, and the arguments of calls that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
import typer
from torch import Tensor

from ipr_fast import checks, files
from ipr_fast.cli.common import SAMPLING, STEPS_AND_OVERLAP, TOKENS, RunOptions, flag, one_of, option, path_option
from ipr_fast.kernels.philox import MAX_CHAIN_ID
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.resolve import BACKENDS
from ipr_fast.sampling.remask import REMASKINGS
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.tokens import ORDERS, TokenSchedule
from ipr_fast.spaces import DEFAULTS


class SamplingArguments(TypedDict):
    """Keyword arguments that `generate_batch` and `refine_batch` share."""

    known: Tensor | None
    chain_ids: Tensor
    schedule: Schedule | TokenSchedule | None
    stochasticity: float
    temperature: float
    seed: int
    progress: bool
    backend: str
    max_chains: int | str
    tf32: bool


def _max_chains(text: str) -> str:
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise typer.BadParameter(f"must be auto or an integer >= 1, got {text!r}")
    return text


@dataclass(frozen=True)
class SamplingOptions:
    """How patches are regenerated: schedule, noise, and how many samples run at a time."""

    known: Annotated[
        Path | None, path_option(SAMPLING, ".npy, .npz or .pt with a bool mask (B, N), true for patches to keep.")
    ] = None
    schedule: Annotated[
        tuple[str, str] | None,
        option(
            SAMPLING,
            "Denoising steps per patch, and how far patches overlap in time, in [0, 1].",
            metavar=STEPS_AND_OVERLAP,
            show_default="the model's",
        ),
    ] = None
    shift: Annotated[
        float | None, option(SAMPLING, "Warp levels toward noise (above 1) or clean.", show_default="the schedule's")
    ] = None
    group: Annotated[
        int | None, option(SAMPLING, "Patches that start at a time.", min=1, max=65536, show_default="the schedule's")
    ] = None
    stochasticity: Annotated[float, option(SAMPLING, "Eta of the posterior step, in [0, 1].")] = 0.5
    temperature: Annotated[
        float, option(SAMPLING, "Factor on the posterior noise; of tokens, what divides the logits.")
    ] = 1.0
    backend: Annotated[str, one_of(SAMPLING, "BACKEND", "How the steps run", sorted(BACKENDS))] = "auto"
    max_chains: Annotated[
        str, option(SAMPLING, "Samples at a time; auto: the fastest that fits.", parser=_max_chains, metavar="COUNT")
    ] = "auto"
    first_chain: Annotated[
        int, option(SAMPLING, "Chain id of the first sample; random numbers depend on it.", min=0)
    ] = 0
    tf32: Annotated[bool, flag(SAMPLING, "Let a GPU multiply float32 in TF32.", "--tf32")] = False
    calls: Annotated[
        int | None,
        option(TOKENS, "Model calls of a regeneration.", min=1, show_default="the model's, else one for each position"),
    ] = None
    order: Annotated[
        str | None,
        one_of(TOKENS, "ORDER", "Which tokens come first", ORDERS, show_default="the model's, else confidence"),
    ] = None
    remask: Annotated[
        str | None, one_of(TOKENS, "STRATEGY", "Mask tokens again", REMASKINGS, show_default="the model's, else never")
    ] = None

    def arguments(
        self, run: RunOptions, device: torch.device, count: int, model: Denoiser | TokenDenoiser, default: str
    ) -> SamplingArguments:
        """Return the arguments of a call for `count` samples. Raises ValueError for bad values and files.

        default: the model's attribute that has its schedule.
        """
        for_tokens = isinstance(model, TokenDenoiser)
        checks.integer("the number of samples", count, 0, MAX_CHAIN_ID + 1)
        first = checks.integer("--first-chain", self.first_chain, 0, MAX_CHAIN_ID + 1 - count)
        return {
            "known": None if self.known is None else files.read_array(self.known, "known").to(device),
            "chain_ids": torch.arange(first, first + count, device=device),
            "schedule": self._token_schedule() if for_tokens else self._patch_schedule(model, default),
            "stochasticity": self.stochasticity,
            "temperature": 1.0 if for_tokens else self.temperature,
            "seed": run.seed,
            "progress": run.progress,
            "backend": self.backend,
            "max_chains": self.max_chains if self.max_chains == "auto" else int(self.max_chains),
            "tf32": self.tf32,
        }

    def _patch_schedule(self, model: Denoiser | TokenDenoiser, default: str) -> Schedule | None:
        for name in ("calls", "order", "remask"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} is for models of tokens, got a model of images")
        schedule = schedule_of("--schedule", self.schedule)
        given = {"shift": self.shift, "group": self.group}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if not chosen:
            return schedule
        try:
            return replace(schedule or getattr(model, default, DEFAULTS[default]), **chosen)
        except ValueError as error:
            raise ValueError(f"--{error}") from error

    def _token_schedule(self) -> TokenSchedule | None:
        for name in ("schedule", "shift", "group"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} is for models of images, got a model of tokens; see --calls")
        given = {"steps": self.calls, "order": self.order, "remask": self.remask}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.temperature != 1.0:
            chosen["temperature"] = self.temperature
        return TokenSchedule(**chosen) if chosen else None


def schedule_of(name: str, values: tuple[str, str] | None) -> Schedule | None:
    """Make a schedule of the two values of the option `name`."""
    if values is None:
        return None
    try:
        steps, overlap = int(values[0]), float(values[1])
    except ValueError as error:
        raise ValueError(f"{name}: must be an integer and a number, got {' '.join(values)}") from error
    try:
        return Schedule(steps, overlap)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
