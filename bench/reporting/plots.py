"""Plots: throughput, time and memory against the batch, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.records import Measurement, Record

from reporting.roofline import plot_roofline, points
from reporting.style import device_name, finish, looks, panels, si, style
from reporting.words import binary

XLABELS = {"batch": "chains in the batch", "iters": "iterations"}


class Line(NamedTuple):
    """A sweep of one model in one measurement, its records in order."""

    model: str  # with type and machine; has one colour in all plots
    label: str
    records: list[Record]


def draw(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Write the plots that the measurements have data for; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    batches, iterations = (lines(measurements, sweep) for sweep in ("batch", "iters"))
    written = []
    if batches:
        written += [plot_throughput(batches, folder / "throughput.png"), plot_time(batches, folder / "time.png")]
    sweeps = {"batch": _with_memory(batches), "iters": _with_memory(iterations)}
    if any(sweeps.values()):
        sweeps = {sweep: found for sweep, found in sweeps.items() if found}
        written.append(plot_memory(sweeps, folder / "memory.png"))
    with_operations = [each for each in measurements if points(each.of("operations"))]
    if with_operations:
        written.append(plot_roofline(with_operations, folder / "roofline.png"))
    return written


def lines(measurements: Sequence[Measurement], sweep: str) -> list[Line]:
    """Return the lines of a sweep ("batch" or "iters"), one per model, type and measurement."""
    devices = [device_name(each.device) for each in measurements]
    places = devices if len(set(devices)) == len(devices) else [each.name for each in measurements]
    found: dict[tuple[str, str], list[Record]] = {}
    for each, place in zip(measurements, places, strict=True):
        for record in (record for record in each.of("end to end") if record.facts.get("sweep") == sweep):
            words = [record.facts["subject"]]
            words += [record.facts["dtype"]] if record.facts["dtype"] != "float32" else []
            words += [place] if len(places) > 1 else []
            fixed = [f"{record.facts['batch']:,} chains"] if sweep == "iters" else []
            fixed += [f"{record.facts['steps']} steps"]
            found.setdefault((", ".join(words), ", ".join(words + fixed)), []).append(record)
    return [Line(*names, sorted(each, key=lambda record: record.facts[sweep])) for names, each in found.items()]


def plot_throughput(found: list[Line], path: Path) -> Path:
    """Plot chain-iterations per second against the batch; dotted: if further chains took no time."""
    figure, axis = _panel("chain-iterations a second", lambda rate: f"{rate:,.0f}" if rate >= 1 else f"{rate:g}")
    colours = looks(line.model for line in found)
    _draw(axis, found, colours, "batch", lambda record: record.rate()[1])
    for line in found:
        x, y = line.records[0].facts["batch"], line.records[0].rate()[1]
        most = max(record.rate()[1] for record in line.records)
        times = min(line.records[-1].facts["batch"] / x, 2 * most / y)
        axis.plot([x, times * x], [y, times * y], ":", color=colours[line.model][0], linewidth=1, zorder=1)
    _finer_ticks(axis)
    return finish(figure, path, "Throughput (dotted: as if one more chain took no more time)")


def plot_time(found: list[Line], path: Path) -> Path:
    """Plot the time of an iteration of the whole batch; dotted: in proportion to the batch."""
    figure, axis = _panel("time of an iteration", lambda time: si(time, "s"))
    colours = looks(line.model for line in found)

    def iteration(record: Record) -> float:
        return record.facts["batch"] / record.rate()[1]

    _draw(axis, found, colours, "batch", iteration)
    axis.set_ylim(*axis.get_ylim())  # the dotted lines may leave the picture
    for line in found:
        first, last = line.records[0].facts["batch"], line.records[-1].facts["batch"]
        end = iteration(line.records[-1])
        axis.plot([first, last], [end * first / last, end], ":", color=colours[line.model][0], linewidth=1, zorder=1)
    _finer_ticks(axis)
    return finish(figure, path, "Time (dotted: in proportion to the batch)")


def plot_memory(sweeps: dict[str, list[Line]], path: Path) -> Path:
    """Plot peak memory, a panel for each sweep."""
    figure, axes = panels(len(sweeps))
    colours = looks(line.model for found in sweeps.values() for line in found)
    for axis, (sweep, found) in zip(axes[0], sweeps.items(), strict=True):
        style(axis, XLABELS[sweep], "", lambda size: binary(round(size)).replace(".00", "").replace(".0", ""), base=2)
        _draw(axis, found, colours, sweep, lambda record: record.facts["peak_bytes"])
    return finish(figure, path, "Peak memory")


def _with_memory(found: list[Line]) -> list[Line]:
    """Return the lines with only the records that have peak memory."""
    kept = [line._replace(records=[each for each in line.records if each.facts.get("peak_bytes")]) for line in found]
    return [line for line in kept if line.records]


def _panel(ylabel: str, tick: Callable[[float], str]) -> tuple[Any, Any]:
    """A figure of one panel, against the batch."""
    figure, axes = panels(1)
    style(axes[0][0], XLABELS["batch"], ylabel, tick)
    return figure, axes[0][0]


def _draw(axis: Any, found: list[Line], colours: dict, sweep: str, value: Callable[[Record], float]) -> None:
    """Draw the lines, with ticks at the measured values."""
    for line in found:
        colour, marker = colours[line.model]
        x, y = [record.facts[sweep] for record in line.records], [value(record) for record in line.records]
        axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=line.label)
    ticks = sorted({record.facts[sweep] for line in found for record in line.records})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _finer_ticks(axis: Any) -> None:
    """Set ticks at 1, 2 and 5 if the axis spans few powers of ten."""
    low, high = axis.get_ylim()
    if high < 100 * low:
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
