"""Formatting of numbers and tables in the reports of bench/."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table without empty columns; "" without rows."""
    rows = list(rows)
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    if not kept:
        return ""
    # A column of numbers, whose cells begin with digits, is aligned right.
    marks = ["---:" if all(row[i][:1].isdigit() for row in rows if row[i]) else "---" for i in kept]
    lines = [[head[i] for i in kept], marks, *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value: float) -> str:
    """Format with three significant digits, and all before the point."""
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def times(quartiles: Sequence[float]) -> str:
    """Format a ratio or rate as median [quartiles]."""
    low, middle, high = map(short, quartiles)
    return f"{middle} [{low}, {high}]"


def percent(quartiles: Sequence[float]) -> str:
    """Format a share as median % [quartiles]."""
    low, middle, high = (short(100 * share) for share in quartiles)
    return f"{middle} % [{low}, {high}]"


def duration(seconds: float) -> str:
    """Format a time in s, ms or us."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{short(seconds / scale)} {unit}"
    return f"{short(seconds / 1e-6)} us"


def binary(size: int) -> str:
    """Format bytes in GiB, MiB, KiB or bytes."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{short(size / 2**power)} {unit}"
    return f"{size} bytes"


def listed(names: Sequence[str]) -> str:
    """Join names as "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
