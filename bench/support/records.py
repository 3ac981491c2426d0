"""A measurement as it is read: what bench/support/measure.py made, from a run or from a file of pytest-benchmark."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.harness import quartiles

ALWAYS = ("device", "unit", "units", "check", "first_call", "against")  # facts that every record has
MACHINE = ("commit", "device", "processor", "cores", "threads", "python", "torch", "triton")  # and every machine


class Unreadable(ValueError):
    """A file that is not a measurement of bench/, or not a whole one."""


@dataclass(frozen=True)
class Record:
    """One benchmark: the seconds of its rounds, and its `facts` (see bench/support/measure.py)."""

    name: str
    group: str
    seconds: list[float]
    facts: dict

    def each(self) -> list[float]:
        """Seconds a unit, round by round."""
        return [time / self.facts["units"] for time in self.seconds]

    def rate(self) -> list[float]:
        """Units a second: first quartile, median, third quartile."""
        return quartiles([1 / time for time in self.each()])

    def yardstick_rate(self, yardstick: str) -> list[float]:
        """The same of a yardstick."""
        other = self.facts["against"][yardstick]
        return quartiles([other["units"] / time for time in other["seconds"]])

    def ratios(self, yardstick: str) -> list[float]:
        """Our rate over a yardstick's, round by round."""
        other = self.facts["against"][yardstick]
        pairs = zip(self.seconds, other["seconds"], strict=True)
        return [(self.facts["units"] / ours) / (other["units"] / theirs) for ours, theirs in pairs]

    def ratio(self, yardstick: str) -> list[float]:
        """Quartiles of `ratios`."""
        return quartiles(self.ratios(yardstick))

    @property
    def label(self) -> str:
        """What was measured, in words."""
        facts = self.facts
        words = [facts.get(name) for name in ("subject", "shape", "variant", "call")]
        if "batch" in facts:
            noun = "sample" if facts["unit"] == "samples" else "chain"
            words.append(f"{facts['batch']:,} {noun}{'s' * (facts['batch'] != 1)}")
        words.append(facts.get("dtype") if facts.get("dtype") != "float32" else None)
        return ", ".join(filter(None, words)) or self.name


@dataclass(frozen=True)
class Measurement:
    """All records of a file, and the machine, versions and commit that they are of; `name` is the file's."""

    name: str
    environment: dict
    records: list[Record]

    def of(self, group: str) -> list[Record]:
        return [record for record in self.records if record.group == group]

    @property
    def on_gpu(self) -> bool:
        return any(record.facts["device"] == "cuda" for record in self.records)

    @property
    def device(self) -> str:
        """The name of what was measured: on a machine with a GPU that may still be the processor."""
        return self.environment["device" if self.on_gpu else "processor"]


def read(path: Path) -> Measurement:
    """The measurement in a JSON file that pytest-benchmark has written for bench/; Unreadable where it is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Unreadable(f"{path} is not JSON: {error}") from error
    try:
        machine = {name: found["machine_info"][name] for name in MACHINE} | found["machine_info"]
        records = [_record(each) for each in found["benchmarks"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        text = f"{path} is not what `pytest bench --benchmark-json FILE` writes: {type(error).__name__}: {error}"
        raise Unreadable(text) from error
    if not records:
        raise Unreadable(f"{path} holds no benchmarks")
    twice = [name for (_, name), count in Counter((each.group, each.name) for each in records).items() if count > 1]
    if twice:
        raise Unreadable(f"{path} has several benchmarks of one name: {', '.join(twice)}")
    return Measurement(path.stem, machine, records)


def _record(each: dict) -> Record:
    facts = each["extra_info"]
    for name in ALWAYS:
        facts[name]  # a KeyError where it is missing
    seconds = list(each["stats"]["data"])
    others = facts["against"].values()
    if not all(len(other["seconds"]) == len(seconds) for other in others):
        raise ValueError(f"{each['name']}: not all sides have as many rounds")
    numbers = [*seconds, facts["units"], *(n for other in others for n in (*other["seconds"], other["units"]))]
    if not seconds or not all(isinstance(n, (int, float)) and 0 < n < float("inf") for n in numbers):
        raise ValueError(f"{each['name']}: rounds and units must be numbers above 0")
    facts["check"]["difference"]  # what was not checked has no figure
    return Record(each["name"], each["group"] or "", seconds, facts)
