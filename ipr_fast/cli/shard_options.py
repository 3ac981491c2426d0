"""`ipr-fast evaluate NAME`: run an experiment that is described in a file, in shards, here or on a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from ipr_fast import checks
from ipr_fast.cli.common import DTYPES, RunOptions, flag, model_from, one_of, option
from ipr_fast.evaluation.scale.cluster import check_address, run_on_ray
from ipr_fast.evaluation.scale.folder import Share, make_manifest, open_run
from ipr_fast.evaluation.scale.plan import MOST_CHAINS, plan_names, read_plan
from ipr_fast.evaluation.scale.records import load_parquet
from ipr_fast.evaluation.scale.run import load_planned, run_in_process
from ipr_fast.evaluation.scale.shards import Worker, shards_of

PUBLISHED = "https://github.com/Chrixtar/SRM/releases/tag/v1.0.0"
SHARDS = "Experiments in shards"


def _share(text: str) -> Share:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(f"must be I/N with 1 <= I <= N, got {text!r}")
    return Share(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class ShardOptions:
    """Options of an experiment that runs in shards."""

    shard: Annotated[
        Share | None,
        option(SHARDS, "Compute every N-th shard, from the I-th on: for job arrays.", parser=_share, metavar="I/N"),
    ] = None
    ray: Annotated[
        str | None,
        option(
            SHARDS,
            "Compute the shards on Ray: the address of a cluster, auto for this machine's, local to start one.",
            metavar="ADDRESS",
        ),
    ] = None
    workers: Annotated[
        int | None, option(SHARDS, "Most workers on Ray.", min=1, show_default="one a GPU, or a CPU core")
    ] = None
    samples: Annotated[bool, flag(SHARDS, "Store all samples, not only those of the first chains.", "--samples")] = (
        False
    )
    dtype: Annotated[
        str | None, one_of(SHARDS, "TYPE", "Type in which the network computes", DTYPES, show_default="float32")
    ] = None

    def given(self) -> list[str]:
        """Return the names of the options that were given."""
        return [name for name, value in vars(self).items() if value]


def is_plan(text: str) -> bool:
    """Whether an experiment's name is that of a plan, or a plan's file."""
    return text in plan_names() or text.endswith(".toml")


def run_plan(
    source: str, out: Path | None, model: str | None, count: int | None, shards: ShardOptions, run: RunOptions
) -> None:
    """Run or resume the plan of that name or file in the folder `out`. Raises ValueError for bad options."""
    if out is None:
        raise ValueError(f"--out: {source} needs a folder for its records")
    if shards.workers is not None and shards.ray is None:
        raise ValueError("--workers is the number of workers on Ray; give --ray too")
    if run.seed:
        raise ValueError(f"--seed: {source} has seeds of its own; change them in its file")
    if count is not None:
        checks.integer("--count", count, 1, MOST_CHAINS)
    if shards.ray is not None:
        check_address(shards.ray)
    load_parquet()  # a missing extra must not cost the user a run
    plan = read_plan(source).changed(model=model, samples=count, kept=MOST_CHAINS if shards.samples else None)
    if model is None and plan.config is not None and not Path(plan.model).exists() and source in plan_names():
        raise ValueError(f"--model: {source} needs the published checkpoint ({PUBLISHED}); give it by --model FILE")
    device, dtype, share = run.checked_device(), shards.dtype or "float32", shards.shard or Share()
    with model_from("model"):
        denoiser = load_planned(plan, torch.device("cpu") if shards.ray else device, dtype)
    worker = Worker(plan, denoiser)  # refuses what does not fit, before there is a folder
    with open_run(out, make_manifest(plan, denoiser, device, dtype), share) as folder:
        try:
            if shards.ray is None:
                run_in_process(folder, worker, share, progress=run.progress)
            else:
                run_on_ray(folder, share, shards.ray, workers=shards.workers, progress=run.progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on with the shards that are left") from None
        done, total = len(folder.finished()), len(shards_of(plan))
    print(f"{done} of {total} shards are in {out}" + ("" if done < total else f"; ipr-fast report {out}"))
