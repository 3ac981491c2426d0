"""The command line: ipr-fast demo | generate | refine | train | convert | info."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import ipr_fast
from ipr_fast.cli import convert, demo, generate, info, refine, train
from ipr_fast.cli.common import printable
from ipr_fast.engine.capture_check import CaptureError
from ipr_fast.errors import BrokenExtra, MissingExtra

# What the user can do something about: told in one line.
EXPECTED = (
    ValueError,
    ArithmeticError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    MissingExtra,
    BrokenExtra,
    CaptureError,
    Warning,  # that PYTHONWARNINGS makes an error
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the command failed, 2 wrong usage, 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    arguments = build_parser().parse_args(argv)
    try:
        with _warnings_in_one_line(arguments.command):
            arguments.run(arguments)
        _flush_output()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _drop_output()
        return 1
    except EXPECTED as error:
        print(f"ipr-fast {arguments.command}: error: {printable(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch's CPU allocator says it
            raise
        print(f"ipr-fast {arguments.command}: error: out of memory ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        hint = "--resume goes on from the last checkpoint" if arguments.command == "train" else str(error)
        print(f"ipr-fast {arguments.command}: interrupted{hint and f' ({hint})'}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _warnings_in_one_line(command: str) -> Iterator[None]:
    """Show a warning as the message alone, without the line of code that it comes from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"ipr-fast {command}: warning: {printable(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _flush_output() -> None:
    """Write out what was printed: into a full disk that fails, and must not be tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's last flush


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipr-fast", description="Refine samples of sequential diffusion models by Iterative Partial Refinement."
    )
    parser.add_argument("--version", action="version", version=f"ipr-fast {ipr_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, generate, refine, train, convert, info):
        command.add(commands)
    return parser
