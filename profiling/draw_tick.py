"""Draw one tick of a Chrome trace: ranges above, the host's operators by kind below.

    python profiling/draw_tick.py trace.json.gz tick.png

The trace is one that profile_refine.py has written on a CPU, of a tick of median length. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from where_time_goes import ATTENTION, BETWEEN, MOVING, NORMS, NUMBERS, OTHER, PREFIX, PRODUCTS, VIEWS, kind_of

from ipr_fast.outputs import replacing

COLOURS = {
    PRODUCTS: "#2b6cb0",
    ATTENTION: "#dd6b20",
    NORMS: "#38a169",
    MOVING: "#a0aec0",
    NUMBERS: "#805ad5",
    VIEWS: "#e2e8f0",
    OTHER: "#e53e3e",
}
ROWS = ("ranges", "inside them", "operators")


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)["traceEvents"]


def a_tick(events: list[dict]) -> tuple[dict, list[dict], list[dict]]:
    """Return the tick of median length, its ranges, and its outermost operators."""
    ranges = [event for event in events if event.get("name", "").startswith(PREFIX)]
    iterations = [event for event in ranges if event["name"] == f"{PREFIX}iteration"]
    ticks = [e for e in ranges if e["name"] == f"{PREFIX}tick" and any(_inside(e, other) for other in iterations)]
    if not ticks:
        raise ValueError("the trace holds no tick")
    tick = sorted(ticks, key=lambda event: event["dur"])[len(ticks) // 2]
    operators: list[dict] = []
    for event in sorted((e for e in events if e.get("cat") == "cpu_op" and _inside(e, tick)), key=lambda e: e["ts"]):
        if not operators or event["ts"] >= operators[-1]["ts"] + operators[-1]["dur"]:
            operators.append(event)
    return tick, [e for e in ranges if e is not tick and _inside(e, tick)], operators


def draw(events: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tick, ranges, operators = a_tick(events)
    start, whole = tick["ts"], tick["dur"]
    figure, axes = pyplot.subplots(figsize=(12, 3.4), layout="constrained")
    for each in ranges:
        row = int(any(_inside(each, other) for other in ranges if other is not each))
        left, width = (each["ts"] - start) / 1e3, each["dur"] / 1e3
        axes.barh(row, width, left=left, height=0.7, color="#edf2f7", edgecolor="#4a5568", linewidth=0.8)
        words = each["name"].removeprefix(PREFIX).replace("_", "\n")
        turned = width < 0.008 * whole / 1e3 * max(map(len, words.split("\n")))
        if width <= 0.02 * whole / 1e3:
            words = words.replace("\n", " ")
        axes.text(
            left + width / 2,
            row,
            words,
            ha="center",
            va="center",
            fontsize=min(7, 65 / max(map(len, words.split("\n")))) if turned else 7,  # points, as long as a box is high
            rotation=90 if turned else 0,
        )
    for kind, colour in COLOURS.items():
        chosen = [e for e in operators if kind_of(e["name"]) == kind]
        if chosen:
            spent = sum(e["dur"] for e in chosen)
            spans = [((e["ts"] - start) / 1e3, e["dur"] / 1e3) for e in chosen]
            label = f"{kind}, {100 * spent / whole:.0f} %"
            axes.broken_barh(spans, (1.65, 0.7), color=colour, label=label)
    between = 1 - sum(e["dur"] for e in operators) / whole
    axes.broken_barh([], (0, 0), color="white", label=f"{BETWEEN}, {100 * between:.0f} %")
    axes.set(xlim=(0, whole / 1e3), xlabel="milliseconds of the tick", yticks=range(3), yticklabels=ROWS, title=title)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _inside(event: dict, other: dict) -> bool:
    return other["ts"] <= event["ts"] and event["ts"] + event["dur"] <= other["ts"] + other["dur"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="A tick of the refinement")
    arguments = parser.parse_args()
    draw(read(arguments.trace), arguments.picture, arguments.title)
    print(f"wrote {arguments.picture}")


if __name__ == "__main__":
    main()
