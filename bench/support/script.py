"""The command line of lanes.py, tokens.py and waves.py: measure, write, print; or print an earlier measurement."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ipr_fast.evaluation import environment
from ipr_fast.outputs import check_no_folders, prepare_folder, write_json


def run(document: str, measure: Callable[..., dict], report: Callable[[dict], str], **options: dict) -> None:
    """Call `measure` with the options, write its result and environment to --out, and print its report.

    options: keyword arguments of `add_argument`, by the argument of `measure`. `--report FILE.json` measures nothing.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers there")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="print this measurement, measure nothing")
    arguments = vars(parser.parse_args())
    out, earlier = arguments.pop("out"), arguments.pop("report")
    try:
        if earlier is not None:
            results = json.loads(earlier.read_text())
        else:
            if out is not None:  # before the work
                check_no_folders([out])
                prepare_folder(out.parent)
            results = {**measure(**arguments), "environment": environment.describe()}
            if out is not None:
                write_json(out, results)
        print(report(results))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (KeyError, TypeError) as error:
        parser.error(f"{earlier}: not a measurement of this script ({error!r})")


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number >= `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number
