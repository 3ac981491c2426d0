"""`ipr-fast report`: tables, curves and galleries of experiments that ran in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipr_fast.cli.common import FILES, path, path_option
from ipr_fast.evaluation.plots import load_pyplot
from ipr_fast.evaluation.scale.readme import read_summary, results_section, write_results
from ipr_fast.evaluation.scale.records import load_parquet
from ipr_fast.evaluation.scale.report import write_report


def run(
    *,
    folders: Annotated[
        list[Path],
        typer.Argument(
            parser=path,
            metavar="FOLDER...",
            help="Folders of `ipr-fast evaluate NAME`; or JSON files of earlier reports, to print their results.",
        ),
    ],
    out: Annotated[
        Path | None, path_option(FILES, "Folder for the report.", show_default="report, in the first folder")
    ] = None,
    readme: Annotated[
        Path | None,
        path_option(FILES, "Markdown file whose sections <!-- results --> and <!-- EXPERIMENT --> are replaced."),
    ] = None,
) -> None:
    """Report experiments that ran in shards: tables, curves, galleries; compare two runs sample by sample.

    Example: ipr-fast report runs/matched
    """
    if all(each.suffix == ".json" for each in folders):
        if out is not None:
            raise ValueError("--out is the folder for a report of folders; JSON files have none")
        summaries = [read_summary(each) for each in folders]
        if readme is None:
            print(results_section(summaries))
        else:
            write_results(readme, summaries)
        return
    if readme is not None:
        raise ValueError("--readme takes the JSON files of a report: ipr-fast report FILE.json ... --readme README.md")
    load_parquet()
    load_pyplot()
    for file in write_report(folders, folders[0] / "report" if out is None else out):
        print(f"wrote {file}")
