"""SRMUNet against the formula as published (bench/per_pixel.py), with the same weights, on this machine.

    python bench/srm_unet.py --out FILE.json     measure, print a table, and write the numbers
    python bench/srm_unet.py --report FILE.json  print an earlier measurement

Each round times both, one after the other, on the same patches; a ratio is the median over the rounds, with quartiles.
Before that, both must give the same prediction. "All patches" gives every patch a level of its own; "a quarter active"
is what refinement calls: a quarter of the patches have a level, the others are clean.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import environment
import torch
from per_pixel import PerPixelUNet

from ipr_fast import ActivePatches
from ipr_fast.models import PRESETS, SRMUNet

ROUNDING = 1e-5  # of the largest value: float32 through a whole forward pass, summed in another order


def make_calls(model: SRMUNet, batch: int) -> dict[str, tuple]:
    """The arguments of the two ways to call a model."""
    num_patches, numel = model.grid.num_patches, model.grid.patch_numel
    generator = torch.Generator().manual_seed(batch)
    patches = torch.randn(batch, num_patches, numel, generator=generator)
    mask = torch.rand(batch, num_patches, generator=generator).argsort(1) < num_patches // 4
    active = ActivePatches.from_mask(mask, num_patches // 4)
    levels = torch.rand(batch, num_patches, generator=generator)
    return {"all patches": (patches, levels), "a quarter active": (patches, active.gather(levels), active)}


def check(baseline: PerPixelUNet, model: SRMUNet, call: tuple) -> None:
    """No figure from a wrong result."""
    for expected, found in zip(baseline(*call), model(*call), strict=True):
        torch.testing.assert_close(found, expected, atol=ROUNDING * expected.abs().max().item(), rtol=0)


def time_rounds(functions: dict[str, torch.nn.Module], call: tuple, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in list(functions.items())[:: (-1) ** i]:  # each goes first in every second round
            start = time.perf_counter()
            function(*call)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}  # the first round warms up


@torch.inference_mode()
def measure(preset: str, batches: list[int], threads: list[int], rounds: int) -> dict:
    torch.manual_seed(0)
    model = SRMUNet(PRESETS[preset]).eval().requires_grad_(False)
    baseline = PerPixelUNet(copy.deepcopy(model).to(memory_format=torch.contiguous_format))
    rows = []
    for number in threads:
        torch.set_num_threads(number)
        for batch in batches:
            for name, call in make_calls(model, batch).items():
                check(baseline, model, call)
                seconds = time_rounds({"per pixel": baseline, "ipr_fast": model}, call, rounds)
                ratios = [a / b for a, b in zip(seconds["per pixel"], seconds["ipr_fast"], strict=True)]
                medians = {key: statistics.median(times) for key, times in seconds.items()}
                quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
                rows.append({"threads": number, "batch": batch, "call": name, "seconds": medians, "ratio": quartiles})
                print(f"{number} threads, {batch} samples, {name}: {quartiles[1]:.2f}", flush=True)
    return {"preset": preset, "rounds": rounds, "rows": rows, "environment": environment.describe()}


def report(results: dict) -> str:
    """The measurement as a Markdown table."""
    lines = [
        "| samples | threads | levels | per pixel, ms | ipr_fast, ms | times faster [quartiles] |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        slow, fast = (1000 * row["seconds"][name] for name in ("per pixel", "ipr_fast"))
        low, middle, high = row["ratio"]
        lines.append(
            f"| {row['batch']} | {row['threads']} | {row['call']} | {slow:.0f} | {fast:.0f} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] |"
        )
    machine = results["environment"]
    lines += [
        "",
        f"Preset {results['preset']}, {results['rounds']} rounds. Measured at {machine['commit']} on "
        f"{machine['device']}, torch {machine['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="even_pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=25, help="at least 2 (default 25)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, help="print this file, measure nothing")
    arguments = parser.parse_args()
    if arguments.report is not None:
        print(report(json.loads(arguments.report.read_text())))
        return
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    results = measure(arguments.preset, arguments.batches, arguments.threads, arguments.rounds)
    print(report(results))
    environment.write(results, arguments.out)


if __name__ == "__main__":
    main()
