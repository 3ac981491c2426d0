"""Options that several commands have, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ipr_fast import checks, files
from ipr_fast.kernels.philox import MAX_CHAIN_ID
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.models.files.sources import NoSuchModel
from ipr_fast.refine import BACKENDS
from ipr_fast.sampling.schedule import Schedule

A_MODEL = "a bundled model's name, a .safetensors file or a Hugging Face hub id"
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULE = {"nargs": 2, "metavar": ("STEPS_PER_PATCH", "OVERLAP")}


def command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], description: str
) -> argparse.ArgumentParser:
    """The parser of a new command, whose arguments go to `run`."""
    parser = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", help=f"{A_MODEL} ({default})")
    parser.add_argument("--dtype", choices=DTYPES, help="in which the network computes (default as stored)")


def load(arguments: argparse.Namespace, default: str, device: torch.device) -> torch.nn.Module:
    """The model that `--model` and `--dtype` name."""
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with model_from("--model"):
        return load_model(default if arguments.model is None else arguments.model, device=device, dtype=dtype)


@contextmanager
def model_from(argument: str) -> Iterator[None]:
    """Errors of a model's name speak of the argument that it comes from."""
    try:
        yield
    except NoSuchModel as error:
        raise ValueError(f"{argument} {error.problem}") from error


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers, in [0, 2**64) (default 0)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default {default}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device of `--device`; checks `--seed` too."""
    checks.integer("--seed", arguments.seed, 0, 2**64 - 1)
    return checks.usable_device("--device", arguments.device)


def printable(value: object) -> str:
    """As one line without control characters: a name or a note in a file may be anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


# ------------------------------------------------------------------------------------------------ the values of options


def path(text: str) -> Path:
    if not text:  # which Path takes for the working directory
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def count(text: str) -> int:
    return _integer_from(text, 1)


def max_chains(text: str) -> int | str:
    return text if text == "auto" else _integer_from(text, 1)


def count_or_zero(text: str) -> int:
    return _integer_from(text, 0)


def _integer_from(text: str, low: int) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"must be an integer >= {low}, got {text!r}")
    return int(text)


# ------------------------------------------------------------------------------------------------------------- sampling


def add_sampling(parser: argparse.ArgumentParser, schedule: str) -> None:
    parser.add_argument("--known", type=path, help=".npy, .npz or .pt with a bool mask (B, N) of given patches")
    parser.add_argument("--schedule", **SCHEDULE, help=schedule)
    parser.add_argument("--stochasticity", type=float, default=0.5, help="eta in [0, 1] (default 0.5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="factor on the posterior noise (default 1)")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="auto", help="default auto")
    parser.add_argument(
        "--max-chains", type=max_chains, default="auto", help="samples at a time (default auto: the fastest that fits)"
    )
    parser.add_argument(
        "--first-chain",
        type=count_or_zero,
        default=0,
        help="chain id of the first sample, on which its random numbers depend (default 0)",
    )
    parser.add_argument("--tf32", action="store_true", help="let a GPU multiply float32 in TF32")


def sampling_of(arguments: argparse.Namespace, device: torch.device, count: int) -> dict:
    """The keyword arguments of `refine_batch` and `generate_batch` that the options of `add_sampling` name."""
    known = None if arguments.known is None else files.read_array(arguments.known, "known").to(device)
    checks.integer("the number of samples", count, 0, MAX_CHAIN_ID + 1)
    first = checks.integer("--first-chain", arguments.first_chain, 0, MAX_CHAIN_ID + 1 - count)
    return {
        "known": known,
        "chain_ids": torch.arange(first, first + count, device=device),
        "schedule": schedule_of("--schedule", arguments.schedule),
        "stochasticity": arguments.stochasticity,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "progress": not arguments.quiet,
        "backend": arguments.backend,
        "max_chains": arguments.max_chains,
        "tf32": arguments.tf32,
    }


def schedule_of(name: str, pair: list[str] | None) -> Schedule | None:
    """The schedule of an option with two values."""
    if pair is None:
        return None
    try:
        return Schedule(int(pair[0]), float(pair[1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
