"""Samples of spatialreasoners' networks: our engine against the library's own sampler.

    python bench/spatialreasoners_sampler.py --out FILE.json     measure (minutes of a core), print a table
    python bench/spatialreasoners_sampler.py --report FILE.json  print an earlier measurement

Needs spatialreasoners, its models alone (see .ci/run). The same random weights and threads, the arms in turns, equally
many calls each: the library's sampler, our engine with the library's network, and for the UNet our engine with its
checkpoint loaded as an SRMUNet. With the same noise all give the same samples
(tests/models/adapters/test_spatialreasoners.py).
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from support import script
from support.harness import Clock, interleaved, quartiles

import ipr_fast
from ipr_fast import Schedule
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.models import SpatialReasonersDenoiser
from ipr_fast.outputs import replacing

SCHEDULE, CHAINS = Schedule(2, 0.5), (1, 8)
NETWORKS: dict[str, dict[str, Any]] = {  # of 16 patches of 3x8x8 numbers
    "unet": {"hid_dims": [64, 128, 128], "attention": [False, False, True], "num_blocks": 2, "time_embedding_dim": 256},
    "dit": {"d_hid": 192, "depth": 6},
    "lightningdit": {"d_hid": 192, "depth": 6},
}
UNTOLD = {"image_size": 32, "patch_size": 8, "num_head_channels": 16, "level_scale": 1000, "level_shift": -1}
UNTOLD |= {"activation": "silu", "max_period": 10_000, "parameterization": "ut", "flow": "rectified"}
UNTOLD |= {"variance": "learned_range"}


def measure(rounds: int) -> dict:
    """Measure every network."""
    return {"rounds": rounds, "rows": [row for kind in NETWORKS for row in measure_network(kind, rounds)]}


def measure_network(kind: str, rounds: int) -> list[dict]:
    """Return seconds of the library, and how many times faster each of our arms is, for each number of chains."""
    from baselines import spatialreasoners_models as library

    network = library.denoising_model(kind, shape=(3, 32, 32), patch_size=8, network=NETWORKS[kind])
    ours: dict[str, Any] = {"the library's network": SpatialReasonersDenoiser(network)}
    if kind == "unet":
        ours["SRMUNet"] = as_srm_unet(network)
    rows = []
    for chains in CHAINS:
        steps, z = SCHEDULE.steps(16), torch.randn(chains, 16, 192)
        options = {"steps": steps, "overlap": SCHEDULE.overlap, "eta": 0.5}
        arms = {"library": lambda z=z, options=options: library.sample(network, z, **options)} | {
            name: lambda model=model, chains=chains: ipr_fast.generate_batch(chains, model=model, schedule=SCHEDULE)
            for name, model in ours.items()
        }
        for arm in arms.values():
            arm()
        seconds = interleaved(arms, torch.device("cpu"), rounds, Clock(math.inf))
        theirs = seconds.pop("library")
        rows += [
            {
                "network": kind,
                "chains": chains,
                "calls": steps,
                "arm": name,
                "library_seconds": quartiles(theirs),
                "faster": quartiles([a / b for a, b in zip(theirs, own, strict=True)]),
            }
            for name, own in seconds.items()
        ]
    return rows


def as_srm_unet(network: Any) -> Any:
    """Return a network's weights as they load from its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.pt"
        with replacing(path) as file:
            torch.save({f"denoiser.{name}": each for name, each in network.denoiser.state_dict().items()}, file)
        return ipr_fast.load_model(path, config=UNTOLD)


def report(results: dict) -> str:
    """Format the measurement as Markdown."""
    lines = [
        "| network | chains | our engine with | library's sampler, s | faster than it, times |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for row in results["rows"]:
        low, middle, high = row["faster"]
        lines.append(
            f"| {row['network']} | {row['chains']} | {row['arm']} | {row['library_seconds'][1]:.3g} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] |"
        )
    calls = results["rows"][0]["calls"]
    lines += ["", f"{calls} calls of the network, {results['rounds']} rounds in turns, quartiles."]
    return "\n".join([*lines[:-1], f"{lines[-1]} {measured_at(results['environment'])}"])


def main() -> None:
    rounds = {"type": script.at_least(2), "default": 5, "help": "at least 2 (default 5)"}
    script.run(__doc__, measure, report, rounds=rounds)


if __name__ == "__main__":
    main()
