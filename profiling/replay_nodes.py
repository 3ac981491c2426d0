"""The nodes of a replay, by kind: what `begin` and `tick` launch for each model.

    python profiling/replay_nodes.py                         counted on tensors without data, on any machine
    python profiling/replay_nodes.py --models "Even Pixels" --chains 8
    python profiling/replay_nodes.py --log FILE              of the captures in the log of a stub CUDA

A count takes an operator, or a launch of a Triton kernel, as one node: bench/guard.py holds that number as "operator
calls" of "begin, as kernels" and "tick, as kernels". On a device an operator may be several nodes: masked attention
has two more, for its random state. A log has them all.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from support.chains import Step
from support.counts import count
from support.launches import can_be_counted
from support.subjects import makers, num_active
from where_time_goes import ATTENTION, MOVING, NORMS, NUMBERS, OTHER, OWN, PRODUCTS, VIEWS, kind_of

from ipr_fast import Denoiser, Schedule

SCHEDULE = Schedule(2, 0.8)  # no node depends on it
LOG = "IPR_FAST_STUB_LOG"  # environment variable that names a log
KINDS = (PRODUCTS, ATTENTION, NORMS, MOVING, NUMBERS, OWN, VIEWS, OTHER)
PARTS = {(True, False): "begin", (False, True): "tick", (True, True): "iteration"}  # by the kernels renoise, denoise
LAUNCHES = ("KERNEL", "MEMCPY", "MEMSET")


class Part(NamedTuple):
    """The operations that one graph holds, by name."""

    subject: str
    name: str
    operations: Counter[str]

    @property
    def nodes(self) -> int:
        return self.operations.total()

    @property
    def by_kind(self) -> Counter[str]:
        kinds: Counter[str] = Counter()
        for name, number in self.operations.items():
            kinds[kind_of(name)] += number
        return kinds


def counted(subject: str, model: Denoiser, chains: int) -> list[Part]:
    """Count both parts of a model, which moves to the device "meta"."""
    active = num_active(model)
    step = Step.begun(model.to("meta"), chains, active, SCHEDULE, "meta", kernels=True)
    subject = f"{subject}, {chains}"
    found = {part.__name__: count(part, "meta", kernels=True) for part in (step.begin, step.tick)}
    return [
        Part(subject, name, Counter({_qualified(operator): calls for operator, calls in counts.by_name.items()}))
        for name, counts in found.items()
    ]


def _qualified(name: str) -> str:
    return name if "::" in name or name.endswith("_kernel") else f"aten::{name}"


def captured(lines: Iterable[str]) -> Iterator[Part]:
    """Yield the parts in a log: tab-separated lines BEGIN-CAPTURE, END-CAPTURE, and launches in between.

    A launch is its kind (of LAUNCHES), its name, its stream and "capture" if it is captured. Other captures, without a
    kernel of the engine, are left out.
    """
    operations: Counter[str] = Counter()
    number = 0
    for line in lines:
        kind, *fields = line.rstrip("\n").split("\t")
        if kind == "BEGIN-CAPTURE":
            operations = Counter()
        elif kind in LAUNCHES and fields[2] == "capture":
            name = re.sub(r" .*", "", fields[0].removeprefix("triton:"))
            operations[name if kind == "KERNEL" else kind.capitalize()] += 1
        elif kind == "END-CAPTURE":
            holds = tuple(f"{name}_kernel" in operations for name in ("renoise", "denoise"))
            if any(holds):
                number += 1
                yield Part(f"capture {number}", PARTS[holds], operations)


def table(parts: Iterable[Part]) -> str:
    """Format the nodes of each part as a Markdown table, without the kinds that are in none."""
    parts = list(parts)
    kinds = [kind for kind in KINDS if any(part.by_kind[kind] for part in parts)]
    lines = [f"| model, chains | graph | nodes | {' | '.join(kinds)} |", "| --- | --- |" + " ---: |" * (1 + len(kinds))]
    for part in parts:
        numbers = (part.nodes, *(part.by_kind[kind] for kind in kinds))
        lines.append(f"| {part.subject} | {part.name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = makers(smoke=False)
    parser.add_argument(
        "--models", nargs="+", choices=known, default=list(known), metavar="MODEL", help=", ".join(known)
    )
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--log", type=Path, default=os.environ.get(LOG), help=f"of a stub CUDA (default ${LOG})")
    parser.add_argument("--operations", action="store_true", help="list the operations of each graph too")
    arguments = parser.parse_args(argv)
    if arguments.log is None and not can_be_counted():
        parser.error("counting kernels needs Triton, without its interpreter; or name a --log")
    if arguments.chains < 1:
        parser.error(f"--chains must be at least 1, got {arguments.chains}")
    if arguments.log is not None:
        with open(arguments.log) as lines:
            parts = list(captured(lines))
    else:
        parts = [part for name in arguments.models for part in counted(name, known[name](), arguments.chains)]
    print(table(parts))
    for part in parts if arguments.operations else ():
        print(f"\n{part.subject}: {part.name}")
        for name, number in part.operations.most_common():
            print(f"{number:5} {name[:110]}")


if __name__ == "__main__":
    main()
