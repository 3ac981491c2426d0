"""Writes the results of experiments into a README, between its markers, from the JSON files of `ipr-fast report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipr_fast.evaluation.intervals import Estimate
from ipr_fast.evaluation.scale.pages import Table, table_lines
from ipr_fast.evaluation.scale.report import summary_markdown, unfinished
from ipr_fast.outputs import read_json, replace_sections

FILE = "a JSON file of `ipr-fast report`"
ALL = "results"  # the marker of the table of all experiments
NEEDED = ("experiment", "arms", "comparisons", "samples", "seeds", "commit", "processor", "torch")


def read_summary(file: Path) -> dict[str, Any]:
    """Read the numbers of one experiment. Raises ValueError for a file of anything else."""
    summary = read_json(file, FILE)
    if missing := [name for name in NEEDED if name not in summary]:
        raise ValueError(f"{file}: not {FILE}: it has no {', '.join(missing)}")
    try:
        results_section([summary])
        summary_markdown(summary)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not {FILE} ({error!r})") from error
    return summary


def write_results(readme: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Replace the sections of a README that belong to these experiments.

    Between `<!-- results -->` and `<!-- /results -->`: the table of all. Between `<!-- NAME -->` and `<!-- /NAME -->`:
    the tables of the experiment of that name. Raises ValueError if there is none of these markers.
    """
    sections = {ALL: results_section(summaries)}
    sections |= {summary["experiment"]: summary_markdown(summary) for summary in summaries}
    replace_sections(readme, sections)


def results_section(summaries: Sequence[dict[str, Any]]) -> str:
    """Format all experiments as one Markdown table: a row for each arm that is compared, with its first comparison."""
    titles = [
        "experiment",
        "arm",
        "samples",
        "iterations",
        "NFE",
        "good before",
        "good after",
        "gain",
        "fixed / broken",
    ]
    rows = [row for summary in summaries for row in _rows(summary)]
    return f"{table_lines(Table(titles, rows))}\n\n{_notes(summaries)}"


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    arms = {arm["name"]: arm for arm in summary["arms"]}
    firsts: dict[str, dict[str, Any]] = {}
    for each in summary["comparisons"]:
        firsts.setdefault(each["arm"], each)
    rows: list[list[str]] = []
    for name, each in firsts.items():
        last = arms[name]["points"][-1]
        before = arms[name]["points"][0] if each["rival"] is None else arms[each["rival"]]["points"][-1]
        rows.append(
            [
                "" if rows else f"`{summary['experiment']} --count {summary['samples']}`",
                name,
                f"{last['samples']:,}",
                f"{last['iteration']:,}",
                f"{last['model_calls']:,.0f}",
                f"{100 * before['share'][0]:.1f} %",
                Estimate(*last["share"]).percent(),
                Estimate(*each["gain"]).points(),
                f"{each['fixed']:,} / {each['broken']:,}",
            ]
        )
    return rows


def _notes(summaries: Sequence[dict[str, Any]]) -> str:
    """Say what was counted, by whom judged, where."""
    judges = dict.fromkeys(summary["judge"] for summary in summaries if summary["judge"])
    notes = ["Intervals 95 %, gains paired by sample.", *(f"{judge[0].upper()}{judge[1:]}." for judge in judges)]
    places: dict[str, list[str]] = {}
    for summary in summaries:
        where = f"at {summary['commit']} on {summary['processor']}, torch {summary['torch']}"
        places.setdefault(where, []).append(summary["experiment"])
    names = {where: f" ({', '.join(found)})" if len(places) > 1 else "" for where, found in places.items()}
    notes.append("Measured " + "; ".join(f"{where}{names[where]}" for where in places) + ".")
    for summary in summaries:
        if left := unfinished(summary):
            notes.append(f"{summary['experiment']}: {left}" if len(summaries) > 1 else left)
    return " ".join(notes)
