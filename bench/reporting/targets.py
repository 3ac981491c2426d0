"""What the benchmarks aim at, and whether it was reached.

A record says so in its facts: `targets={"batched": 8}` (at least so many times faster), or `{"outside_share": 0.03}`
and `{"waits": 0}` (at most).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from support.records import Record

from reporting.words import percent, short, times

AT_MOST = {"outside_share": "share of a tick outside the network", "waits": "the host's waits for the device"}
MARKS = {True: "met", False: "not met", None: "not measured"}


class Target(NamedTuple):
    """What is aimed at: at least (or at most) `wanted`; met is None where it was not measured."""

    name: str
    wanted: str
    measured: str
    met: bool | None


def targets(records: Iterable[Record]) -> list[Target]:
    """All targets, reached or not, in the order of the records."""
    return [
        _target(record, name, wanted) for record in records for name, wanted in record.facts.get("targets", {}).items()
    ]


def _target(record: Record, name: str, wanted: float) -> Target:
    if name in AT_MOST:
        return _at_most(record, name, wanted)
    title, text = f"{record.label}: against {name}", f"at least {wanted:g} times"
    if name not in record.facts["against"]:
        return Target(title, text, "", None)
    ratio = record.ratio(name)
    return Target(title, text, times(ratio), ratio[1] >= wanted)


def _at_most(record: Record, name: str, wanted: float) -> Target:
    """A target for a fact of the record: a share (quartiles, or one number) or a count."""
    is_share, found = name.endswith("share"), record.facts.get(name)
    text = f"at most {100 * wanted:g} %" if is_share else f"at most {wanted:g}"
    title = f"{record.label}: {AT_MOST[name]}"
    if found is None:
        return Target(title, text, "", None)
    middle = found[1] if isinstance(found, list) else found
    words = percent(found) if isinstance(found, list) else f"{100 * middle:.1f} %" if is_share else short(middle)
    return Target(title, text, words, middle <= wanted)
