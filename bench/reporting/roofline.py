"""The roofline of each device's operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.records import Measurement, Record

from ipr_fast.evaluation.plots import INK
from reporting.style import device_name, finish, looks, panels, si, style


def plot_roofline(measurements: Sequence[Measurement], path: Path) -> Path:
    """Plot FLOP/s of operations against FLOP per byte, below the copy and matrix product of the same run."""
    operations: dict[str, list[Record]] = {}
    for each in measurements:
        operations.setdefault(each.device, []).extend(each.of("operations"))
    figure, axes = panels(len(operations), beside=1.2)
    colours = looks(record.facts["subject"] for records in operations.values() for record, _, _ in points(records))
    handles = {}
    for axis, (device, records) in zip(axes[0], operations.items(), strict=True):
        style(axis, "FLOP a byte that must move", "", lambda rate: si(rate, "FLOP/s"))
        for record, intensity, rate in points(records):
            name = record.facts["subject"]
            colour, marker = colours[name]
            (handles[name],) = axis.plot(intensity, rate, marker, color=colour, markersize=6, alpha=0.85)
        _draw_roof(axis, records)
        axis.set_title(device_name(device), fontsize=10, color=INK)
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right center")
    return finish(figure, path)


def points(operations: Sequence[Record]) -> list[tuple[Record, float, float]]:
    """Return the operations with their FLOP per byte and FLOP/s."""
    found = []
    for record in operations:
        flops, size, unit = (record.facts.get(name) for name in ("flops", "bytes", "unit"))
        if flops and size and unit in ("bytes", "flop"):
            rate = record.rate()[1]
            found.append((record, flops / size, rate if unit == "flop" else rate * flops / size))
    return found


def _draw_roof(axis: Any, operations: Sequence[Record]) -> None:
    """Draw the best copy as a slope, the best matrix product of each type as a level."""
    copies, products = [], {}
    for record in operations:
        if "copy" in record.facts["against"]:
            copies.append(record.yardstick_rate("copy")[1])
        if "matrix product" in record.facts["against"]:
            rate, dtype = record.yardstick_rate("matrix product")[1], record.facts["dtype"]
            products[dtype] = max(rate, products.get(dtype, 0.0))
    across = [intensity for _, intensity, _ in points(operations)]
    bandwidth, top = max(copies, default=None), max(products.values(), default=None)
    ridge = top / bandwidth if bandwidth and top else max(across)
    left, right = min(ridge / 30, *(each / 2 for each in across)), 4 * max(ridge, *across)
    look = {"color": INK, "linewidth": 1.3, "zorder": 1}
    text = {"textcoords": "offset points", "fontsize": 8, "color": INK, "ha": "right"}
    if bandwidth:
        axis.plot([left, ridge], [bandwidth * left, bandwidth * ridge], **look)
        middle = (left * ridge) ** 0.5
        axis.annotate(f"copy: {si(bandwidth, 'B/s')}", (middle, bandwidth * middle), (-8, 2), **text)
    for dtype, rate in products.items():
        axis.plot([rate / bandwidth if bandwidth else left, right], [rate, rate], **look)
        axis.annotate(f"matrix product, {dtype}: {si(rate, 'FLOP/s')}", (right, rate), (0, 16), **text)
    axis.set_xlim(left, right)
    rates = [rate for _, _, rate in points(operations)]
    axis.plot(left, 6 * max(top or 0, *rates), alpha=0)  # leaves room above, on axes that share their heights
