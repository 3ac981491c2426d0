"""Records of bench/support/measure.py, from a run or from a file of pytest-benchmark."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.harness import quartiles

ALWAYS = ("device", "unit", "units", "check", "first_call", "against")  # facts of every record
MACHINE = ("commit", "device", "processor", "cores", "threads", "python", "torch", "triton")  # facts of every machine


class Unreadable(ValueError):
    """Raised for a file that is not a complete measurement of bench/."""


@dataclass(frozen=True)
class Record:
    """One benchmark: the seconds of its rounds, and its `facts` (see bench/support/measure.py)."""

    name: str
    group: str
    seconds: list[float]
    facts: dict

    def each(self) -> list[float]:
        """Seconds per unit, by round."""
        return [time / self.facts["units"] for time in self.seconds]

    def rate(self) -> list[float]:
        """Units per second: first quartile, median, third quartile."""
        return quartiles([1 / time for time in self.each()])

    def yardstick_rate(self, yardstick: str) -> list[float]:
        """Units per second of a yardstick, in quartiles."""
        other = self.facts["against"][yardstick]
        return quartiles([other["units"] / time for time in other["seconds"]])

    def ratios(self, yardstick: str) -> list[float]:
        """Our rate over that of a yardstick, by round."""
        other = self.facts["against"][yardstick]
        pairs = zip(self.seconds, other["seconds"], strict=True)
        return [(self.facts["units"] / ours) / (other["units"] / theirs) for ours, theirs in pairs]

    def ratio(self, yardstick: str) -> list[float]:
        """Quartiles of `ratios`."""
        return quartiles(self.ratios(yardstick))

    @property
    def label(self) -> str:
        """Subject, shape and size in words."""
        facts = self.facts
        words = [facts.get(name) for name in ("subject", "shape", "variant", "call")]
        if "batch" in facts:
            noun = "sample" if facts["unit"] == "samples" else "chain"
            words.append(f"{facts['batch']:,} {noun}{'s' * (facts['batch'] != 1)}")
        words.append(facts.get("dtype") if facts.get("dtype") != "float32" else None)
        return ", ".join(filter(None, words)) or self.name


@dataclass(frozen=True)
class Measurement:
    """All records of a file `name`, with their machine, versions and commit."""

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
        """The measured device: on a machine with a GPU it may still be the processor."""
        return self.environment["device" if self.on_gpu else "processor"]


def read(path: Path) -> Measurement:
    """Read a JSON file that pytest-benchmark wrote for bench/; raise Unreadable for any other."""
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
    facts["check"]["difference"]  # required: no figure without a check
    return Record(each["name"], each["group"] or "", seconds, facts)
