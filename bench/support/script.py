"""The command line that the measurements of results share: measure, print, write; or print an earlier one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ipr_fast.evaluation import environment
from ipr_fast.files import prepare_folder, write_json


def run(document: str, measure: Callable[..., dict], report: Callable[[dict], str], **options: dict) -> None:
    """Call `measure` with the options that were given, write what it returns where --out says, and print its report.

    options: what `add_argument` takes, by the name of measure's argument. `--report FILE.json` measures nothing.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers there")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="print this measurement, measure nothing")
    arguments = vars(parser.parse_args())
    out, earlier = arguments.pop("out"), arguments.pop("report")
    if earlier is not None:
        try:
            results = json.loads(earlier.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{earlier}: {error}")
    else:
        if out is not None and (out.is_dir() or not _nearest(out).is_dir()):
            parser.error(f"{out}: is a folder, or below a file")  # said before the work, not after it
        try:
            measured = measure(**arguments)
        except ValueError as error:
            parser.error(str(error))
        device = torch.device(arguments["device"]) if "device" in arguments else None
        results = {**measured, "environment": environment.describe(device)}
        if out is not None:
            prepare_folder(out.parent)
            write_json(out, results)
    try:
        print(report(results))
    except (KeyError, TypeError) as error:
        parser.error(f"{earlier}: not a measurement of this script ({error!r})")


def _nearest(path: Path) -> Path:
    """What exists of the folders above a path."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def at_least(least: int) -> Callable[[str], int]:
    """What reads an option that is a whole number, and not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number
