"""The distance of a tick from the device's limits: FLOPs and bytes of every model and batch, and their floors.

    python profiling/roofline.py                           counted, under this device's own matrix product and copy
    python profiling/roofline.py --measure                 and ticks timed, where they fit and are not too long
    python profiling/roofline.py --machine h200            the floors on another machine, by its data sheet
    python profiling/roofline.py --out FILE.json --plot FILE.png

A tick is one denoiser call and one update, here with a quarter of the patches active. The ideal floor moves weights,
prepared context, state and predictions once; the floor as launched moves all that every operator reads and writes.
Data that stays in a cache is not moved, so such a tick can be faster than its floor as launched. Over the floor: the
time as a multiple of the floor as launched, by the product and the copy of the same rounds.
Counting uses meta tensors. It counts Triton kernels for a GPU, torch twins for a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from floors import MACHINES, Roof, floors, work_of_tick
from reporting import style
from support.chains import Step, capture_on
from support.harness import device_argument
from support.launches import can_be_counted
from support.measure import Arm
from support.subjects import makers, num_active, shortened

from ipr_fast import Denoiser
from ipr_fast.engine.memory import SHARE, PeakBytes, available_bytes
from ipr_fast.engine.precision import float32_products
from ipr_fast.evaluation import environment
from ipr_fast.outputs import prepare_folder, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONGEST = 2.0  # seconds of a floor beyond which a tick is not timed
STEPS, ROUNDS = 5, 7


def yardsticks(device: torch.device, dtype: torch.dtype) -> dict[str, Arm]:
    """Return a matrix product that keeps the device busy, and a copy too large for its caches."""
    size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source, target = torch.zeros(2, length, device=device)
    product = Arm(lambda: a @ b, 2 * size**3)
    return {"matrix product": product, "copy": Arm(lambda: target.copy_(source), 2 * source.nbytes)}


def times(arms: dict[str, Arm], device: torch.device) -> dict[str, float]:
    """Return the median seconds of each arm over interleaved rounds, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(ROUNDS + 1):
        for name, arm in list(arms.items())[:: (-1) ** i]:
            found[name].append(arm.seconds(device))
    return {name: statistics.median(each[1:]) for name, each in found.items()}


def roof_of(arms: dict[str, Arm], found: dict[str, float]) -> Roof:
    """Return the roof that the yardsticks reached."""
    return Roof(*(arms[name].units / found[name] for name in ("matrix product", "copy")))


@torch.inference_mode()
def measure_tick(model: Denoiser, batch: int, device: torch.device, arms: dict[str, Arm]) -> tuple[float, Roof]:
    """Time a tick, on a GPU as a graph, and the yardsticks in the same rounds."""
    slots = num_active(model)
    schedule = shortened(model.refine_schedule, slots, STEPS)
    step, steps = Step.begun(model, batch, slots, schedule, device), schedule.steps(slots)
    tick = capture_on(device)("tick", step.tick)

    def ticks() -> None:
        for _ in range(steps):
            tick()

    found = times(arms | {"ticks": Arm(ticks, steps, step.begin)}, device)
    return found["ticks"] / steps, roof_of(arms, found)


@torch.inference_mode()
def why_not(without_data: Denoiser, batch: int, floor: float, device: torch.device) -> str | None:
    """Return why a tick is not timed, or None."""
    if floor > LONGEST:
        return "too long"
    with PeakBytes() as memory:
        Step.begun(without_data, batch, num_active(without_data), without_data.refine_schedule, "meta").tick()
    return "no room" if memory.peak > SHARE * available_bytes(device) else None


def rows_of(name: str, arguments: argparse.Namespace, arms: dict[str, Arm], roof: Roof) -> list[dict]:
    """Return a row for each batch of a model."""
    device, model = arguments.device, makers(smoke=False)[name]().to(DTYPES[arguments.dtype])
    without_data = copy.deepcopy(model).to("meta")
    rows = []
    for batch in arguments.batches:
        work = work_of_tick(without_data, batch, arguments.kernels)
        facts = {"model": name, "batch": batch, "operators": len(work.operations), **work._asdict()}
        row = facts | floors(work, roof)._asdict()
        del row["operations"]
        if arguments.measure:
            row["skipped"] = why_not(without_data, batch, row["as_launched"], device)
            if row["skipped"] is None:
                row["seconds"], own = measure_tick(model.to(device), batch, device, arms)
                row["over"] = row["seconds"] / floors(work, arguments.given or own).as_launched
        rows.append(row)
    return rows


def number(value: float) -> str:
    """Format with three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table."""
    columns = "model | chains | GFLOP | MB, at least | MB, as launched | operators | ideal floor, ms | bound by"
    columns += " | floor as launched, ms | memory-bound | top operator | measured, ms | over the floor"
    lines = [f"| {columns} |", "| --- |" + " ---: |" * 6 + " --- | ---: | ---: | --- | ---: | ---: |"]
    for row in rows:
        cells = [row["model"], f"{row['batch']:,}", number(row["flops"] / 1e9), number(row["least_bytes"] / 1e6)]
        cells += [number(row["bytes"] / 1e6), f"{row['operators']:,}", number(1e3 * row["ideal"]), row["ideal_bound"]]
        cells += [number(1e3 * row["as_launched"]), f"{100 * row['memory_bound']:.0f} %"]
        cells += [f"{row['most']}, {100 * row['most_share']:.0f} %"]
        cells += [number(1e3 * row["seconds"]), f"{row['over']:.2f}"] if "over" in row else [row.get("skipped", ""), ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict], roof: Roof, path: Path) -> None:
    """Plot ticks, FLOP/s against FLOP per byte: rings at the floor as launched, filled if measured."""
    figure, ((axis,),) = style.panels(1, beside=1.2)
    style.style(axis, "FLOP a byte, as launched", "TFLOP/s", lambda rate: f"{rate / 1e12:g}")
    across, ridge = [row["flops"] / row["bytes"] for row in rows], roof.peak / roof.bandwidth
    ends = [min(*across, ridge) / 2, ridge, 2 * max(*across, ridge)]
    axis.plot(ends, [min(roof.peak, roof.bandwidth * end) for end in ends], color="black", linewidth=1.3)
    handles = {}
    for name, (colour, marker) in style.looks(row["model"] for row in rows).items():
        own = [(x, row) for x, row in zip(across, rows, strict=True) if row["model"] == name]
        for when, fill in (("as_launched", "none"), ("seconds", "full")):
            points = [(x, row["flops"] / row[when]) for x, row in own if when in row]
            places = zip(*points, strict=True) if points else ((), ())
            (handles[name],) = axis.plot(*places, marker, color=colour, fillstyle=fill, linestyle="none")
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right center")
    style.finish(figure, path)


def parse() -> argparse.Namespace:
    """Parse the command line. given: its roof or None; kernels: whether to count Triton kernels."""
    names = makers(smoke=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=list(names))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 4096])
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--machine", choices=MACHINES, help="the floors on this GPU")
    parser.add_argument("--peak-tflops", type=float, help="with --bandwidth-gbs: the floors under these")
    parser.add_argument("--bandwidth-gbs", type=float)
    parser.add_argument("--measure", action="store_true", help="time ticks on the device")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    numbers = [arguments.peak_tflops, arguments.bandwidth_gbs]
    if numbers != [None, None] and (None in numbers or min(numbers) <= 0 or arguments.machine):
        parser.error("--peak-tflops and --bandwidth-gbs go together, above 0, and without --machine")
    if min(arguments.batches) < 1:
        parser.error("--batches must be at least 1")
    arguments.given = None if numbers == [None, None] else Roof(1e12 * numbers[0], 1e9 * numbers[1])
    if arguments.machine is not None:
        arguments.given = MACHINES[arguments.machine][arguments.dtype]
    arguments.kernels = arguments.machine is not None or arguments.device.type == "cuda"
    if arguments.kernels and not can_be_counted():
        parser.error("counting kernels needs Triton, without its interpreter")
    return arguments


def main() -> None:
    arguments = parse()
    device, given = arguments.device, arguments.given
    with float32_products(device, tf32=False):
        arms = yardsticks(device, DTYPES[arguments.dtype]) if given is None or arguments.measure else {}
        roof = roof_of(arms, times(arms, device)) if given is None else given
        rows = [row for name in arguments.models for row in rows_of(name, arguments, arms, roof)]
    machine = environment.describe(device)
    origin = f"of a matrix product and a copy on {machine['device']}" if given is None else "as given"
    print(f"{roof.peak / 1e12:.3g} TFLOP/s in {arguments.dtype} and {number(roof.bandwidth / 1e9)} GB/s, {origin}.")
    print(f"Operators as {'Triton kernels' if arguments.kernels else 'torch twins'}.\n\n{table(rows)}")
    facts = {"dtype": arguments.dtype, "kernels": arguments.kernels, "given": given is not None, "roof": roof._asdict()}
    if arguments.out is not None:
        prepare_folder(arguments.out.parent)
        write_json(arguments.out, facts | {"rows": rows, "environment": machine})
    if arguments.plot is not None:
        plot(rows, roof, arguments.plot)


if __name__ == "__main__":
    main()
