"""The command line: builds the app from the commands, and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Annotated

import torch
import typer

import ipr_fast
from ipr_fast.cli import convert, demo, evaluate, generate, info, refine, report, train
from ipr_fast.cli.common import flatten, printable
from ipr_fast.engine.capture_check import CaptureError
from ipr_fast.errors import ExtraError, UserCodeError
from ipr_fast.models.contract import NotFiniteWarning

# Commands in the groups of the main help. A command's name is that of its module.
COMMANDS: dict[str, tuple[ModuleType, ...]] = {
    "Try it": (demo,),
    "Generate and refine": (generate, refine),
    "Models": (train, evaluate, report, convert, info),
}

# Errors that the user can act on: told in one line.
EXPECTED = (
    ValueError,
    ArithmeticError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    ExtraError,
    UserCodeError,
    CaptureError,
    Warning,  # that PYTHONWARNINGS makes an error
)


def build_app() -> typer.Typer:
    """Build the app with all commands; no shell completion, since each TAB would take seconds to import torch."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for panel, modules in COMMANDS.items():
        for module in modules:
            name = module.__name__.rpartition(".")[2]
            app.command(name, rich_help_panel=panel)(flatten(module.run))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ipr-fast {ipr_fast.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Refine samples of sequential diffusion models by Iterative Partial Refinement.

    Example: ipr-fast demo
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the command failed, 130 interrupted.

    Ends in SystemExit(2) after wrong usage, and SystemExit(0) after `--help` and `--version`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    arguments = list(sys.argv[1:] if argv is None else argv)
    app = typer.main.get_group(build_app())
    command = arguments[0] if arguments and arguments[0] in app.commands else ""
    program = f"ipr-fast {command}".rstrip()
    try:
        with _warnings_in_one_line(program), app.make_context("ipr-fast", arguments) as context:
            app.invoke(context)
        _flush_output()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.TyperException as error:
        message = _usage_message(error)
        if message:  # empty where the help is shown instead
            print(f"{program}: error: {message}. See {program} --help", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _drop_output()
        return 1
    except EXPECTED as error:
        print(f"{program}: error: {printable(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # from torch's CPU allocator
            raise
        print(f"{program}: error: out of memory ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        hint = "--resume goes on from the last checkpoint, if there is one" if command == "train" else str(error)
        print(f"{program}: interrupted{hint and f' ({hint})'}", file=sys.stderr)
        return 130
    return 0


def _usage_message(error: typer.TyperException) -> str:
    """Describe a usage error on one line, with the value that came, which messages of typer's pydantic leave out."""
    message = error.format_message().rstrip(".")
    cause: object = error.__cause__
    if hasattr(cause, "errors"):
        message += f", got {cause.errors()[0]['input']!r}"
    return printable(message)


@contextmanager
def _warnings_in_one_line(program: str) -> Iterator[None]:
    """Show a warning as its message alone, without the line of code that it comes from; one of NaN is an error."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{program}: warning: {printable(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("error", NotFiniteWarning)
        yield


def _flush_output() -> None:
    """Write out what was printed; on a full disk that fails here, and is not tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's last flush
