"""The README's section on performance."""

from __future__ import annotations

from collections.abc import Sequence

from support.records import Measurement, Record

from reporting.tables import BASELINES, TABLES, memory, rounds, standing, steps, subject
from reporting.words import duration, listed, percent, short, table, times

SECTION = "performance"  # the name of its markers
MOST_ROWS = 4  # per model, in a sweep of batches


def readme_section(measurements: Sequence[Measurement]) -> str:
    """Format the section between the markers as Markdown."""
    blocks = [" ".join(_machine(each) for each in measurements), _baselines(measurements), _scaling(measurements)]
    blocks += [_growth(measurements), _outside(measurements), *_tables_of_gpus(measurements), _on_gpu(measurements)]
    return "\n\n".join(filter(None, blocks))


def _machine(measurement: Measurement) -> str:
    facts = measurement.environment
    where = f"{measurement.device}, {facts['cores']} cores, threads: {facts['threads']}, torch {facts['torch']}"
    return f"Measured at {facts['commit']} on {where}. {standing(measurement)}".strip()


def _device(measurement: Measurement, measurements: Sequence[Measurement]) -> str:
    return measurement.device if len(measurements) > 1 else ""


def _baselines(measurements: Sequence[Measurement]) -> str:
    found = [(each, record) for each in measurements for record in each.of("baselines")]
    rows = [
        [
            _device(each, measurements),
            subject(record),
            f"{record.facts['batch']:,}",
            _other_type(record),
            steps(record),
            *(times(record.ratio(name)) if name in record.facts["against"] else "" for name in BASELINES),
        ]
        for each, record in found
    ]
    if not rows:
        return ""
    head = ["device", "ipr_fast is faster, times", "chains", "type", "steps", *BASELINES.values()]
    return (
        f"{table(head, rows)}\n\n"
        "Medians over rounds in which both sides take turns, with quartiles; same weights, same threads, same steps of "
        "an iteration (shortened: of how many), float32 where no type is named. *One at a time* is the loop that "
        "researchers run today. " + rounds([record for _, record in found])
    )


def _scaling(measurements: Sequence[Measurement]) -> str:
    rows = [
        [
            _device(each, measurements),
            record.facts["subject"],
            _other_type(record),
            steps(record),
            f"{record.facts['batch']:,}",
            f"{record.facts['iters']:,}",
            short(record.rate()[1]),
            duration(1 / record.rate()[1]),
            memory(record),
            duration(record.facts["first_call"]),
        ]
        for each in measurements
        for record in _some(each)
    ]
    head = ["device", "model", "type", "steps", "chains", "iterations", "chain-iterations/s", "each", "peak memory"]
    head.append("first call")
    return table(head, rows)


def _growth(measurements: Sequence[Measurement]) -> str:
    """How time grows with the last chains, and memory with the iterations, in a sentence."""
    told = []
    for each in measurements:
        where = f" on {each.device}" if len(measurements) > 1 else ""
        for sweep in _sweeps(each, "batch"):
            first, last = (sweep[max(0, len(sweep) - 3)], sweep[-1])
            more, longer = last.facts["batch"] / first.facts["batch"], first.rate()[1] / last.rate()[1]
            told.append(
                f"{more * longer:.1f} times the time for {more:.0f} times the chains, from {first.facts['batch']:,} to "
                f"{last.facts['batch']:,} ({last.facts['subject']}{where})"
            )
        for sweep in _sweeps(each, "iters"):
            iters = listed([str(record.facts["iters"]) for record in sweep])
            sizes = {record.facts["peak_bytes"] for record in sweep}
            same = "the same memory" if len(sizes) == 1 else f"memory of {memory(sweep[0])} to {memory(sweep[-1])}"
            told.append(f"{same} for {iters} iterations ({sweep[0].facts['subject']}{where})")
    return f"It takes {'; '.join(told)}." if told else ""


def _sweeps(measurement: Measurement, name: str) -> list[list[Record]]:
    """Return the sweeps of a kind, one for each model and type, in order."""
    sweeps: dict[tuple, list[Record]] = {}
    for record in measurement.of("end to end"):
        if record.facts.get("sweep") == name:
            sweeps.setdefault((record.facts["subject"], record.facts["dtype"]), []).append(record)
    return [sorted(sweep, key=lambda record: record.facts[name]) for sweep in sweeps.values()]


def _some(measurement: Measurement) -> list[Record]:
    """Return a few records of each sweep of batches, from the smallest to the largest."""
    chosen = []
    for sweep in _sweeps(measurement, "batch"):
        shown = min(MOST_ROWS, len(sweep))
        chosen += [sweep[round(i * (len(sweep) - 1) / max(1, shown - 1))] for i in range(shown)]
    return chosen


def _other_type(record: Record) -> str:
    """Return the type unless it is float32."""
    return "" if record.facts["dtype"] == "float32" else record.facts["dtype"]


def _outside(measurements: Sequence[Measurement]) -> str:
    """Describe the share of a step outside the network on CPUs; GPUs have a table."""
    told = []
    for each in measurements:
        if each.on_gpu:
            continue
        device = f" on {each.device}" if len(measurements) > 1 else ""
        for record in each.of("step"):
            if "outside_share" in record.facts:
                told.append(f"{percent(record.facts['outside_share'])} for {record.label}{device}")
    return f"Outside the network a step spends, of its time: {'; '.join(told)}." if told else ""


def _tables_of_gpus(measurements: Sequence[Measurement]) -> list[str]:
    """Return the tables of steps and of operations on GPUs, each with a line that names the GPU, and one of notes."""
    blocks = []
    for each in measurements:
        for group in ("step", "operations"):
            head, row, note = TABLES[group]
            rows = [row(record) for record in each.of(group)]
            if each.on_gpu and rows:
                blocks += [
                    f"{group.capitalize()} on {each.device}:",
                    table(head, rows),
                    f"{note} {rounds(each.of(group))}",
                ]
    return blocks


def _on_gpu(measurements: Sequence[Measurement]) -> str:
    """Say which groups were measured on a GPU, and which not."""
    told, devices = [], dict.fromkeys(each.device for each in measurements if each.on_gpu)
    for device in devices:
        there = [group for group in TABLES if any(each.of(group) for each in measurements if each.device == device)]
        missing = [group for group in TABLES if group not in there]
        others = f"; not yet: {listed(missing)}" if missing else ""
        told.append(f"On a GPU ({device}) these groups were measured: {listed(there)}{others}.")
    return " ".join(told) or "Nothing here was measured on a GPU yet."
