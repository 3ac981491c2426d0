"""Tables and pictures of what `pytest bench --benchmark-json FILE.json` measured.

    python bench/report.py FILE.json ...                      Markdown of all files
    python bench/report.py FILE.json ... --plots FOLDER       and pictures: throughput, time, memory, roofline
    python bench/report.py FILE.json ... --readme README.md   write their summary into the README, between its markers
    python bench/report.py --compare OLD.json NEW.json        pair by pair: how many times faster, with an interval

For any other file the status is 2, and nothing is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from reporting.compare import compare
from reporting.plots import draw
from reporting.readme import SECTION, readme_section
from reporting.tables import report
from reporting.targets import MARKS, targets
from reporting.words import binary, percent, short, times
from support.records import Record, read

from ipr_fast.errors import ExtraError
from ipr_fast.outputs import replace_sections

__all__ = ["main", "readme_section", "report", "summary"]

MOST_LINES = 50
RATIOS_OF = ("baselines", "step", "operations")  # shown first if there is no room for all
LARGE = {"bytes": (1e9, "GB/s"), "flop": (1e12, "TFLOP/s")}


def summary(records: Sequence[Record]) -> str:
    """Format records for a terminal: a line for each ratio, sweep and target."""
    rates = _rates(records)
    aims = [(each.name, f"{each.measured} ({each.wanted}): {MARKS[each.met]}") for each in targets(records)]
    ratios = [(each.group, each.label, _ratios(each)) for each in _by_group(records) if each.facts["against"]]
    room = max(10, MOST_LINES - len(rates) - len(aims) - len(RATIOS_OF) - 4)
    parts = {
        f"{group}: speed-up over ..., median [quartiles]": [row for name, *row in ratios[:room] if name == group]
        for group in dict.fromkeys(group for group, *_ in ratios[:room])
    }
    if len(ratios) > room:
        parts["left out"] = [(f"{len(ratios) - room} more ratios", "bench/report.py FILE.json has them all")]
    parts |= {"rates": rates, "targets": aims}
    lines = []
    for title, rows in parts.items():
        if rows:
            width = max(len(name) for name, _ in rows)
            lines += [title, *(f"  {name:{width}}  {text}".rstrip() for name, text in rows)]
    return "\n".join(lines)


def _by_group(records: Sequence[Record]) -> list[Record]:
    order = {group: i for i, group in enumerate(RATIOS_OF)}
    return sorted(records, key=lambda record: order.get(record.group, len(order)))


def _ratios(record: Record) -> str:
    """Format the ratios of a record, its share outside the network, and its rate."""
    said = [f"{times(record.ratio(name))} {name}" for name in record.facts["against"]]
    if "outside_share" in record.facts:
        said.append(f"{percent(record.facts['outside_share'])} outside the network")
    if record.facts["unit"] in LARGE:
        scale, unit = LARGE[record.facts["unit"]]
        said.append(f"{short(record.rate()[1] / scale)} {unit}")
    return ", ".join(said)


def _rates(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return a line for each sweep of a model: its first and last rate, and its peak memory."""
    sweeps: dict[str, list[Record]] = {}
    for record in records:
        if not record.facts["against"]:
            words = [record.facts.get(name) for name in ("subject", "dtype", "sweep")]
            sweeps.setdefault(", ".join(filter(None, words)) or record.name, []).append(record)
    return [(name, _range(each)) for name, each in sweeps.items()]


def _range(records: Sequence[Record]) -> str:
    sweep, unit = records[0].facts.get("sweep"), records[0].facts["unit"]
    ends = [records[0], records[-1]] if len(records) > 1 else [records[0]]
    rates = " to ".join(
        short(each.rate()[1]) + (f" ({each.facts[sweep]:,})" if sweep in each.facts else "") for each in ends
    )
    sizes = [each.facts["peak_bytes"] for each in records if each.facts.get("peak_bytes") is not None]
    return f"{rates} {unit}/s" + (f", at most {binary(max(sizes))}" if sizes else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD.json", "NEW.json"))
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, metavar="README.md")
    given = parser.parse_args(arguments)
    if bool(given.files) == bool(given.compare) or (given.compare and (given.plots or given.readme)):
        parser.error("give files, with --plots and --readme as you like, or --compare OLD.json NEW.json alone")
    try:
        if given.compare:
            print(compare(*map(read, given.compare)))
            return
        measurements = [read(path) for path in given.files]
        print(report(measurements))
        if given.readme:
            replace_sections(given.readme, {SECTION: readme_section(measurements)})
        if given.plots:
            print("\nPictures:", ", ".join(map(str, draw(measurements, given.plots))) or "nothing to draw")
    except (ValueError, ExtraError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
