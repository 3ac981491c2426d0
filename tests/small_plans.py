"""Plans of experiments, and models of few weights for them, small enough for tests."""

from pathlib import Path

import pyarrow.parquet
import torch
from small_models import randomise

import ipr_fast
from ipr_fast.evaluation.scale.folder import RunFolder, Share, make_manifest, open_run
from ipr_fast.evaluation.scale.plan import Plan, read_plan
from ipr_fast.evaluation.scale.run import load_planned, run_in_process
from ipr_fast.evaluation.scale.shards import Worker
from ipr_fast.models import PatchTransformer, PatchTransformerConfig

CPU = torch.device("cpu")
QUICK = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 1.0), "refine_schedule": (2, 1.0)}
PLAN = """
title = "A test"
task = "even-pixels"
model = "{model}"
samples = 10
batch = 4
seeds = [0, 1]
kept = 5

[arms."one pass"]

[arms.refined]
iterations = 3

[arms."best of 2"]
policy = "independent"
iterations = 1
"""


def write_plan(folder: Path, text: str = PLAN) -> Path:
    """Write a model of few weights and a plan for it; return the plan's file."""
    model = folder / "model.safetensors"
    if not model.exists():
        ipr_fast.save_model(randomise(PatchTransformer(PatchTransformerConfig(3, 32, 4, **QUICK)), seed=0), model)
    (folder / "plan.toml").write_text(text.format(model=model))
    return folder / "plan.toml"


def run_plan(plan: Plan, out: Path, share: Share = Share()) -> RunFolder:  # noqa: B008 - it is frozen
    """Run a plan in this process."""
    model = load_planned(plan, CPU, "float32")
    with open_run(out, make_manifest(plan, model, CPU, "float32"), share) as folder:
        run_in_process(folder, Worker(plan, model), share)
    return folder


def run_file(file: Path, out: Path, share: Share = Share()) -> RunFolder:  # noqa: B008 - it is frozen
    """Run the plan of a file in this process."""
    return run_plan(read_plan(str(file)), out, share)


def rows(out: Path) -> list[tuple]:
    """Return all rows of a run's folder but for their seconds, sorted; a row in two files is twice among them."""
    found = []
    for file in sorted(out.glob("*.parquet")):
        table = pyarrow.parquet.read_table(file).drop_columns(["seconds"])
        found += list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return sorted(found, key=lambda row: row[:4])
