"""Traces of torch's profiler on a GPU: device time by range, and host waits.

A kernel belongs to the host range that launched it. This is exact without graphs; a replay launches all kernels of a
graph at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from support.harness import synchronize

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
FROM_HOST = ("cuda_runtime", "cuda_driver")

UNTIL_DONE = ", and until the device has done it"

Span = tuple[float, float]


def record(works: dict[str, Callable[[], object]], device: torch.device) -> list[dict]:
    """Run the works in turn, each in a range of its name; return the events in Chrome's trace format.

    It is one recording, as some versions of CUPTI see nothing in a second one.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        for name, work in works.items():
            with record_function(name + UNTIL_DONE):
                with record_function(name):
                    work()
                synchronize(device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]


@contextmanager
def marked(module: nn.Module, name: str) -> Iterator[None]:
    """Within, calls of the module are ranges of this name."""
    ranges: list[record_function] = []

    def enter(*_: object) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def time_by_place(events: list[dict], work: str, place: str) -> dict:
    """Return a work's device microseconds inside ranges of the name `place`, and outside by kernel.

    A kernel without a launch in the trace counts as outside.
    """
    ranges, places = spans(events, work + UNTIL_DONE), spans(events, place)
    calls = (event for event in events if event.get("cat") in FROM_HOST)
    launched = {_correlation(call): call["ts"] for call in calls if _correlation(call) is not None}
    inside, outside = 0.0, Counter()
    for event in events:
        if event.get("cat") not in ON_DEVICE or not _in(event["ts"], ranges):
            continue
        if _in(launched.get(_correlation(event), -1.0), places):
            inside += event["dur"]
        else:
            outside[event["name"][:60]] += event["dur"]
    total = inside + sum(outside.values())
    if not inside:
        raise RuntimeError(f"the trace holds no device work of {place!r} in {work!r}")
    share = 1 - inside / total
    return {"inside_us": inside, "outside_us": dict(outside.most_common(12)), "outside_share": share}


def waits(events: list[dict], work: str) -> dict:
    """Count the host's waits for the device in a work: synchronising calls and copies to the host."""
    ranges = spans(events, work)
    calls = [e for e in events if e.get("cat") in FROM_HOST and _in(e["ts"], ranges)]
    replays = sum("GraphLaunch" in call["name"] for call in calls)
    own = {_correlation(call) for call in calls} - {None}
    found = Counter(call["name"] for call in calls if "Synchronize" in call["name"])
    found += Counter(e["name"] for e in events if _to_host(e) and _correlation(e) in own)
    if not replays:
        raise RuntimeError(f"the trace holds no replay of a graph in {work!r}")
    return {"replays": replays, "waits": sum(found.values()), "of": dict(found)}


def spans(events: list[dict], name: str) -> list[Span]:
    """Return the host's ranges of a name."""
    found = (e for e in events if e.get("cat") == "user_annotation" and e.get("name") == name)
    return [(e["ts"], e["ts"] + e["dur"]) for e in found]


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")


def _to_host(event: dict) -> bool:
    return event.get("cat") == "gpu_memcpy" and ("DtoH" in event["name"] or "Device -> Host" in event["name"])


def _in(time: float, ranges: list[Span]) -> bool:
    return any(start <= time < end for start, end in ranges)
