"""Options that several commands share, and what a command makes of their values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import Tensor

from ipr_fast import checks, files, pictures
from ipr_fast.cli.factory import is_factory, model_from_factory
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.models.files.sources import NoSuchModel
from ipr_fast.models.token_denoiser import TokenDenoiser

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


def write(out: Path, samples: files.Samples, model: object) -> str:
    """Write samples (B, ...) that a model made; return what pictures show, in words, if that is not [-1, 1].

    Pictures show the range of the model's training samples, or where it is None, as of latents, that of the samples.
    Those that were read from pictures stay in [-1, 1].
    """
    is_array = out.suffix in files.SUFFIXES
    if not is_array and samples.names is None and samples.images.ndim > 2:
        trained = contract.bounds(model, "value_range") if hasattr(model, "value_range") else pictures.PIXELS
        samples = dataclasses.replace(samples, shown=pictures.range_of(samples.images, trained))
    files.write_samples(out, samples)
    if is_array or samples.shown == pictures.PIXELS:
        return ""
    low, high = samples.shown
    return f" as {'plots' if samples.images.ndim == 3 else 'pictures'} of numbers from {low:.4g} to {high:.4g}"


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
