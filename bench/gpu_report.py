"""The Markdown of bench/gpu.py: what was aimed at and reached, then all figures."""

from __future__ import annotations

from typing import NamedTuple

import kernels

LABELS = {
    "one at a time": "one at a time (a)",
    "batched": "batched eager (b)",
    "compiled": "batched, torch.compile (c)",
}


class Target(NamedTuple):
    """What is aimed at: at least (or at most) `wanted`; measured is None where it was not."""

    name: str
    wanted: str
    measured: str | None
    met: bool | None


def targets(results: dict) -> list[Target]:
    """All targets, reached or not."""
    parts = results["parts"]
    found = []
    for subject, batch, wanted in (
        ("4x4 transformer", 4096, {"one at a time": 200, "batched": 8}),
        ("9x9 transformer", 4096, {"one at a time": 200, "batched": 8}),
        ("Even Pixels", 256, {"one at a time": 100, "batched": 8, "compiled": 2}),
    ):
        rows = [row for row in parts.get("throughput", {}).get("cases", []) if row["dtype"] == "float32"]
        here = next((row for row in rows if (row["subject"], row["batch"]) == (subject, batch)), {})
        for baseline, times in wanted.items():
            median = here.get("faster", {}).get(baseline)
            found.append(
                Target(
                    f"{subject}, {batch} chains, against {LABELS[baseline]}",
                    f"{times} times",
                    None if median is None else f"{median[1]:.1f} times [{median[0]:.1f}, {median[2]:.1f}]",
                    None if median is None else median[1] >= times,
                )
            )
    engine = parts.get("engine", {})
    for subject in ("Even Pixels", "MNIST Sudoku"):
        share = engine.get("outside", {}).get(subject, {}).get("outside_share")
        measured = None if share is None else f"{100 * share:.2f} %"
        name = f"{subject}, 64 chains, share of a tick outside the network"
        found.append(Target(name, "at most 3 %", measured, None if share is None else share <= 0.03))
    waits = engine.get("waits", {}).get("waits")
    name = "the host's waits for the device in three iterations"
    found.append(Target(name, "0", None if waits is None else str(waits), None if waits is None else waits == 0))
    return found


def report(results: dict) -> str:
    """Everything, as Markdown; whatever is missing is said to be."""
    parts = results["parts"]
    blocks = [_machine(results), _standing(results), _targets(results)]
    for name, make in (
        ("throughput", _throughput),
        ("engine", _engine),
        ("kernels", lambda part: [kernels.report(part)] if "rows" in part else []),
        ("checks", lambda part: [f"`pytest -m gpu`: {part['summary']}"] if "summary" in part else []),
    ):
        if name in parts:
            blocks += [f"## {name}", *make(parts[name])]
    return "\n\n".join([*blocks, *_left_out(parts)])


def _machine(results: dict) -> str:
    machine = results["environment"]
    driver = machine.get("before", {}).get("driver_version", "none")
    trial = "A trial of the script with tiny models; its figures mean nothing. " if results["smoke"] else ""
    versions = f"torch {machine['torch']}, triton {machine.get('triton')}, Python {machine['python']}"
    return (
        f"{trial}Measured at {machine['commit']} on {machine['device']} (driver {driver}, CUDA {machine.get('cuda')}), "
        f"{machine['processor']}, {versions}, in {results.get('seconds', 0):.0f} s."
    )


def _standing(results: dict) -> str:
    """Whether the speed-ups may be believed."""
    checks, gates = (results["parts"].get(name, {}).get("passed") for name in ("checks", "throughput"))
    if checks is False or gates is False:
        return "**CHECKS FAILED: no speed-up below is a claim.**"
    if not checks or not gates:
        return "**Not all checks were run: no speed-up below is a claim until they are.**"
    return "All checks passed."


def _targets(results: dict) -> str:
    marks = {True: "met", False: "**not met**", None: "not measured"}
    rows = [[each.name, each.wanted, each.measured or "", marks[each.met]] for each in targets(results)]
    return table(["target", "wanted", "measured", ""], rows)


def _throughput(part: dict) -> list[str]:
    rows = []
    for case in part.get("cases", []):
        for name, arm in case["arms"].items():
            reason = "does not fit" if "does_not_fit" in arm else "failed" if "failed" in arm else "skipped"
            rate, faster = arm.get("rate_of_its_own_schedule"), case.get("faster", {}).get(name)
            rows.append(
                [
                    case["subject"],
                    f"{case['batch']:,}",
                    case["dtype"],
                    LABELS.get(name, name),
                    f"{rate[1]:,.3g}" if rate else reason,
                    "{1:.1f} [{0:.1f}, {2:.1f}]".format(*faster) if faster else "",
                    _binary(arm.get("peak_allocated")),
                    f"{arm['first_call']:.1f}" if "first_call" in arm else "",
                    f"{case['steps']} of {case['own_steps']}",
                ]
            )
    head = ["model", "chains", "type", "arm", "chain-iterations/s", "ours is faster, times", "peak memory"]
    note = (
        "Chain-iterations a second are those of the model's own schedule, scaled from the steps that were run. Ratios "
        "are medians over interleaved rounds, with quartiles. (a) is one chain, whatever the batch. "
        "Peak memory is what an arm allocates beside models and samples."
    )
    return [table([*head, "first call, s", "steps"], rows), note]


def _engine(part: dict) -> list[str]:
    blocks = []
    rows = [
        [
            row["subject"],
            f"{row['batch']:,}",
            variant,
            f"{1000 * each['tick'][1]:.3f}",
            f"{each['capture']:.2f}",
            _binary(each.get("peak_allocated")),
        ]
        for row in part.get("ticks", [])
        for variant, each in row["variants"].items()
    ]
    if rows:
        head = ["model", "chains", "engine", "ms a tick", "first iteration, s more", "peak memory"]
        blocks.append(table(head, rows))
    if "ragged" in part:
        ragged = part["ragged"]
        rows = [
            [
                label,
                f"{1000 * ragged[label]['iteration'][1]:.1f}",
                f"{1e6 * ragged[label]['chain_step'][1]:.3f}",
                f"{100 * ragged[label]['idle_share']:.1f} %",
                f"{ragged[label]['mean_active']:.1f} of {ragged[label]['slots']}",
                _binary(ragged[label].get("peak_allocated")),
            ]
            for label in ("no clues", "clues")
        ]
        head = ["", "ms an iteration", "us a chain-step", "idle lanes", "active of slots", "peak memory"]
        title = f"{ragged['subject']}, {ragged['batch']:,} chains, with 0 to {ragged['most_clues']} clues and without"
        blocks += [title, table(head, rows)]
    for subject, found in part.get("outside", {}).items():
        most = ", ".join(f"`{name}` {us / 1000:.2f} ms" for name, us in list(found["outside_us"].items())[:6])
        share, inside = 100 * found["outside_share"], found["inside_us"] / 1000
        text = f"{subject}, {found['batch']} chains: {share:.2f} % of the ticks' device time is outside the network"
        blocks.append(f"{text} ({inside:.1f} ms inside; {most})")
    if "by_difference" in part:
        shares = "{1:.2f} % [{0:.2f}, {2:.2f}]".format(*(100 * s for s in part["by_difference"]["outside_share"]))
        blocks.append(f"{part['by_difference']['subject']}, by ticks less the network alone, both on graphs: {shares}")
    if "waits" in part:
        blocks.append(
            "{replays} replays in {iterations} iterations of {subject}: waits {waits}, {of}".format(**part["waits"])
        )
    return blocks


def _left_out(parts: dict) -> list[str]:
    skipped = [f"- {name}: {line}" for name, part in parts.items() for line in part.get("skipped", [])]
    failed = [
        f"- {name}: {what}: {why['message']}"
        for name, part in parts.items()
        for what, why in part.get("failed", {}).items()
    ]
    blocks = ["## Skipped\n\n" + "\n".join(skipped)] if skipped else []
    return blocks + (["## Failed\n\n" + "\n".join(failed)] if failed else [])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _binary(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"
