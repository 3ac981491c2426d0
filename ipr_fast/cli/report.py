"""`ipr-fast report`: tables, curves and galleries of experiments that ran in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipr_fast.cli.common import FILES, path, path_option
from ipr_fast.evaluation.plots import load_pyplot
from ipr_fast.evaluation.scale.records import load_parquet
from ipr_fast.evaluation.scale.report import write_report


def run(
    *,
    folders: Annotated[
        list[Path], typer.Argument(parser=path, metavar="FOLDER...", help="Folders of `ipr-fast evaluate NAME`.")
    ],
    out: Annotated[
        Path | None, path_option(FILES, "Folder for the report.", show_default="report, in the first folder")
    ] = None,
) -> None:
    """Report experiments that ran in shards: tables, curves, galleries; compare two runs sample by sample.

    Example: ipr-fast report runs/matched
    """
    load_parquet()
    load_pyplot()
    for file in write_report(folders, folders[0] / "report" if out is None else out):
        print(f"wrote {file}")
