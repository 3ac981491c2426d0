"""Measurements as Markdown: machines, targets, then all figures by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from support.records import Measurement, Record

from reporting.targets import MARKS, targets
from reporting.words import binary, duration, percent, short, table, times

BASELINES = {
    "one at a time": "one at a time",
    "batched": "batched loop",
    "compiled": "batched loop, torch.compile",
    "per pixel": "per-pixel embedding",
}


def report(measurements: Sequence[Measurement]) -> str:
    """Format all measurements as Markdown."""
    found = [(_on(each, measurements), record) for each in measurements for record in each.records]
    blocks = ["\n".join(f"- {machine(each)}" for each in measurements)]
    rows = [
        [name, each.name, each.wanted, each.measured, MARKS[each.met]]
        for name in dict.fromkeys(name for name, _ in found)
        for each in targets(record for owner, record in found if owner == name)
    ]
    blocks += ["## Targets", table(["measured in", "target", "wanted", "measured", "met?"], rows)] if rows else []
    for group, (head, row, note) in TABLES.items():
        rows = [[name, *row(record)] for name, record in found if record.group == group]
        if rows:
            of_group = [record for _, record in found if record.group == group]
            blocks += [f"## {group.capitalize()}", table(["measured in", *head], rows), f"{note} {rounds(of_group)}"]
    others = [(name, record) for name, record in found if record.group not in TABLES]
    if others:
        rows = [[name, record.name, _each(record), _against(record)] for name, record in others]
        blocks += ["## Others", table(["measured in", "benchmark", "time", "speed-up over"], rows)]
    blocks.append("Each figure was taken after a check of the same work against the reference.")
    return "\n\n".join(blocks)


def machine(measurement: Measurement) -> str:
    """Format a measurement's name, machine, versions, commit and GPU checks as one line."""
    facts = measurement.environment
    smi = facts.get("nvidia-smi", {})
    gpu = f" (driver {smi.get('driver_version', 'unknown')}, CUDA {facts.get('cuda')})" if measurement.on_gpu else ""
    beside = f", {facts['processor']}" if measurement.on_gpu else ""
    return (
        f"{measurement.name}: {measurement.device}{gpu}{beside}, {facts['cores']} cores, threads: {facts['threads']}; "
        f"torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}; commit {facts['commit']}. "
        f"{standing(measurement)}"
    ).strip()


def standing(measurement: Measurement) -> str:
    """Say whether the GPU checks and all benchmarks passed, as bench/gpu.py recorded."""
    checks, bench = (measurement.environment.get(name) for name in ("checks", "bench"))
    said = []
    if checks is None and measurement.on_gpu:
        said.append("**The tests that need a GPU were not run before.**")
    elif checks is not None and checks["passed"]:
        said.append(f"GPU checks passed ({checks['summary']}).")
    elif checks is not None:
        said.append(f"**GPU CHECKS FAILED ({checks['summary']}): no figure is a claim.**")
    if bench and not bench["passed"]:
        said.append(f"**BENCHMARKS FAILED ({bench['summary']}).**")
    if bench and bench.get("stopped"):
        said.append(f"The run was stopped before its end ({bench['summary']}).")
    if measurement.environment.get("sizes") == "smoke":
        said.append("**A trial with tiny models: its figures mean nothing.**")
    return " ".join(said)


def _on(measurement: Measurement, among: Sequence[Measurement]) -> str:
    """Return the measurement's name if there are several."""
    return measurement.name if len(among) > 1 else ""


def rounds(records: Sequence[Record]) -> str:
    """Say how many rounds the figures of a table have at least."""
    return f"At least {min(len(record.seconds) for record in records)} rounds."


def _each(record: Record) -> str:
    """Format the time of one unit."""
    return f"{duration(1 / record.rate()[1])} a {record.facts['unit'].removesuffix('s')}"


def _ratio(record: Record, yardstick: str, write: Callable[[Sequence[float]], str] = times) -> str:
    return write(record.ratio(yardstick)) if yardstick in record.facts["against"] else ""


def _against(record: Record, but: Sequence[str] = ()) -> str:
    return "; ".join(f"{times(record.ratio(name))} {name}" for name in record.facts["against"] if name not in but)


def _batch(record: Record) -> str:
    return f"{record.facts['batch']:,}" if "batch" in record.facts else ""


def memory(record: Record) -> str:
    """Format the peak memory of a call, "" if not measured."""
    size = record.facts.get("peak_bytes")
    return "" if size is None else binary(size)


def steps(record: Record) -> str:
    """Format the steps of an iteration, "of" those of the model's own schedule."""
    taken, own = (record.facts.get(name) for name in ("steps", "own_steps"))
    return "" if taken is None else f"{taken}" if own is None else f"{taken} of {own}"


def subject(record: Record) -> str:
    """Return the model or operation, and the kind of call."""
    call = record.facts.get("call")
    return record.facts.get("subject", record.name) + (f", one call, {call}" if call else "")


def _operation(record: Record) -> list[str]:
    facts, rate = record.facts, record.rate()[1]
    size = facts["bytes"] if facts["unit"] == "bytes" else facts["flops"]
    return [
        subject(record),
        facts.get("shape", ""),
        _batch(record),
        facts.get("dtype", ""),
        duration(size / rate),
        short(1e-9 * rate) if facts["unit"] == "bytes" else "",
        _ratio(record, "copy", percent),
        short(1e-12 * rate) if facts["unit"] == "flop" else "",
        _ratio(record, "matrix product", percent),
        _ratio(record, "torch"),
    ]


def _step(record: Record) -> list[str]:
    facts = record.facts
    share = facts.get("outside_share")
    return [
        facts.get("subject", record.name),
        _batch(record),
        facts.get("dtype", ""),
        facts.get("variant", "") + (", whole iterations" if "without graphs" in facts["against"] else ""),
        _each(record),
        "" if share is None else percent(share),
        _against(record, ["network"] if share is not None else ()),
        memory(record),
    ]


def _end_to_end(record: Record) -> list[str]:
    facts = record.facts
    return [
        facts.get("subject", record.name),
        facts.get("dtype", ""),
        facts.get("sweep", ""),
        _batch(record),
        str(facts.get("iters", "")),
        str(facts.get("ratio", "")),
        steps(record),
        times(record.rate()),
        duration(1 / record.rate()[1]),
        memory(record),
        duration(facts["first_call"]),
    ]


def _baseline(record: Record) -> list[str]:
    return [
        subject(record),
        _batch(record),
        record.facts.get("dtype", ""),
        steps(record),
        _each(record),
        *(_ratio(record, name) for name in BASELINES),
        duration(record.facts["first_call"]),
    ]


OPERATION_HEAD = ["operation", "shape", "chains", "type", "a call", "GB/s", "of a copy's rate", "TFLOP/s"]
STEP_HEAD = ["model", "chains", "type", "variant", "time", "outside the network", "speed-up over"]
END_TO_END_HEAD = ["model", "type", "sweep of", "chains", "iterations", "alpha", "steps", "chain-iterations/s", "each"]
BASELINE_HEAD = ["model", "chains", "type", "steps", "ours", *(f"over {name}" for name in BASELINES.values())]
TABLES = {
    "operations": (
        [*OPERATION_HEAD, "of a matrix product's rate", "times faster than plain torch (attention of all tokens)"],
        _operation,
        "GB/s are the bytes that must move, over the time. All ratios: median [quartiles] over rounds, side by side.",
    ),
    "step": (
        [*STEP_HEAD, "peak memory"],
        _step,
        "A step, or tick, is one call of the network and one update of all chains. Of whole iterations it has its part "
        "of what comes once in one: the choice of patches, renoising, and the context's keys and values.",
    ),
    "end to end": (
        [*END_TO_END_HEAD, "peak memory", "first call"],
        _end_to_end,
        "Rates are of iterations with so many steps. The first call pays for what later ones find ready.",
    ),
    "baselines": (
        [*BASELINE_HEAD, "first call"],
        _baseline,
        "How many times faster than a loop or formula of plain torch: same weights, same steps, in the same rounds.",
    ),
}
