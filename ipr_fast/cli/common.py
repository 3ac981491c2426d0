"""Options that several commands share, and what a command makes of their values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

import torch
import typer
from torch import Tensor

from ipr_fast import checks, files
from ipr_fast.cli.factory import is_factory, model_from_factory
from ipr_fast.kernels.philox import MAX_CHAIN_ID
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.models.files.sources import NoSuchModel
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.resolve import BACKENDS
from ipr_fast.sampling.remask import REMASKINGS
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.tokens import ORDERS, TokenSchedule

# Panels of `--help`, in the order in which commands declare them.
FILES, REFINEMENT, ACCEPTANCE = "Input and output", "Refinement", "Acceptance by a reward"
SAMPLING, TOKENS = "Sampling", "Sampling of tokens"
MODEL, RUN = "Model", "Run"
MODEL_SOURCE = "A bundled model, a .safetensors file or a Hugging Face hub id"
DTYPES = ("float32", "bfloat16", "float16")
STEPS_AND_OVERLAP = "STEPS OVERLAP"


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass parameter of a command by its fields, which typer then takes as options."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))
            continue
        fields, field_hints = dataclasses.fields(kind), get_type_hints(kind, include_extras=True)
        bundles[name] = kind, [field.name for field in fields]
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=field_hints[f.name])
            for f in fields
        ]

    @functools.wraps(command)
    def flat(**values: object) -> None:
        built = {
            name: kind(**{field: values.pop(field) for field in fields}) for name, (kind, fields) in bundles.items()
        }
        command(**values, **built)

    flat.__dict__["__signature__"] = inspect.Signature(parameters)
    return flat


def option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """Declare an option in a panel of `--help`. names: if not the parameter's; settings: as for typer.Option."""
    if "min" in settings:
        settings.setdefault("metavar", "<int>")  # typer's own is twice as wide
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def flag(panel: str, help: str, name: str) -> Any:
    """Declare an option without a value, false unless given."""
    return option(panel, help, name, metavar="")


def path_option(panel: str, help: str, **settings: Any) -> Any:
    """Declare an option whose value is a path."""
    return option(panel, help, parser=path, metavar="PATH", **settings)


def one_of(panel: str, metavar: str, help: str, choices: Iterable[str], *names: str, **settings: Any) -> Any:
    """Declare an option whose value is one of these words; they are appended to its help."""
    words = ", ".join(choices)

    def parse(text: str) -> str:
        if text not in words.split(", "):
            raise typer.BadParameter(f"must be one of {words}, got {text!r}")
        return text

    return option(panel, f"{help}: {words}.", *names, parser=parse, metavar=metavar, **settings)


def path(text: str) -> Path:
    """Convert to a path; refuse "", which Path takes for the working directory."""
    if not text:
        raise typer.BadParameter("must be a path, got ''")
    return Path(text)


def tell(out: Path, samples: Tensor, kind: str) -> None:
    """Say that samples (B, ...) were written to `out`. Raises ValueError if some of them have NaN or inf."""
    bad = checks.not_finite(samples).nonzero().flatten().tolist()
    if not bad:
        print(f"wrote {len(samples)} {kind} to {out}")
        return
    listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    where = "all" if out.suffix in files.SUFFIXES else "the others"
    raise ValueError(
        f"{len(bad)} of {len(samples)} samples have NaN or inf, from the model's predictions (number {listed}); "
        f"{where} are in {out}"
    )


def printable(value: object) -> str:
    """Format a value on one line, control characters escaped: names and notes in files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


# ---------------------------------------------------------------------------------------------------------------- run


SEED = "Seed of all random numbers, in [0, 2**64)."


@dataclass(frozen=True)
class DeviceOptions:
    """Device and progress bars, for every command that computes."""

    device: Annotated[
        str | None, option(RUN, "Torch device.", metavar="DEVICE", show_default="cuda if there is one, else cpu")
    ] = None
    quiet: Annotated[bool, flag(RUN, "Show no progress bars.", "--quiet")] = False

    @property
    def progress(self) -> bool:
        return not self.quiet

    def checked_device(self) -> torch.device:
        """Return the device to run on. Raises ValueError for a bad `--device`."""
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return checks.usable_device("--device", default if self.device is None else self.device)


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """Device, progress bars and seed."""

    seed: Annotated[int, option(RUN, SEED)] = 0

    def checked_device(self) -> torch.device:
        """Return the device to run on. Raises ValueError for a bad `--device` or `--seed`."""
        checks.integer("--seed", self.seed, 0, 2**64 - 1)
        return super().checked_device()


# -------------------------------------------------------------------------------------------------------------- model


def model_option(**settings: Any) -> Any:
    """Declare the option `--model`."""
    return option(MODEL, f"{MODEL_SOURCE}; or module:factory of your own.", metavar="MODEL", **settings)


DtypeOption = Annotated[
    str | None, one_of(MODEL, "TYPE", "Type in which the network computes", DTYPES, show_default="as stored")
]


def load(source: str, dtype: str | None, device: torch.device) -> Denoiser | TokenDenoiser:
    """Load the model that `--model` and `--dtype` name."""
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    if is_factory(source):
        return model_from_factory(source, device, torch_dtype)
    with model_from("--model"):
        return load_model(source, device=device, dtype=torch_dtype)


@contextmanager
def model_from(argument: str) -> Iterator[None]:
    """Name the command's argument in errors about a model that was not found."""
    try:
        yield
    except NoSuchModel as error:
        hint = "; a factory of yours is module:factory, without .py or /" if ":" in error.problem else ""
        raise ValueError(f"{argument} {error.problem}{hint}") from error


# ----------------------------------------------------------------------------------------------------------- sampling


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
        self, run: RunOptions, device: torch.device, count: int, model: Denoiser | TokenDenoiser
    ) -> SamplingArguments:
        """Return the arguments of a call for `count` samples. Raises ValueError for bad values and files."""
        for_tokens = isinstance(model, TokenDenoiser)
        checks.integer("the number of samples", count, 0, MAX_CHAIN_ID + 1)
        first = checks.integer("--first-chain", self.first_chain, 0, MAX_CHAIN_ID + 1 - count)
        return {
            "known": None if self.known is None else files.read_array(self.known, "known").to(device),
            "chain_ids": torch.arange(first, first + count, device=device),
            "schedule": self._token_schedule() if for_tokens else self._patch_schedule(),
            "stochasticity": self.stochasticity,
            "temperature": 1.0 if for_tokens else self.temperature,
            "seed": run.seed,
            "progress": run.progress,
            "backend": self.backend,
            "max_chains": self.max_chains if self.max_chains == "auto" else int(self.max_chains),
            "tf32": self.tf32,
        }

    def _patch_schedule(self) -> Schedule | None:
        for name in ("calls", "order", "remask"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} is for models of tokens, got a model of images")
        return schedule_of("--schedule", self.schedule)

    def _token_schedule(self) -> TokenSchedule | None:
        if self.schedule is not None:
            raise ValueError("--schedule is for models of images, got a model of tokens; see --calls")
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
