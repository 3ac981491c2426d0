"""Kill processes that run a plan, at random moments of their work: kill_runs.py FOLDER TIMES."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_plans import CPU

from ipr_fast.evaluation.scale.folder import RunFolder, Share, make_manifest, open_run
from ipr_fast.evaluation.scale.plan import read_plan
from ipr_fast.evaluation.scale.run import load_planned, run_in_process
from ipr_fast.evaluation.scale.shards import Worker

LONGEST = 0.05  # seconds from the first shard's beginning to a kill: one shard or a few


def main(folder: Path, times: int) -> None:
    torch.set_num_threads(1)
    plan, out, rng = read_plan(str(folder / "plan.toml")), folder / "killed", random.Random(0)
    model = load_planned(plan, CPU, "float32")
    manifest, worker = make_manifest(plan, model, CPU, "float32"), Worker(plan, model)

    def work(started: int) -> None:
        """Run the plan; write a byte when a shard is begun."""
        compute = RunFolder.compute
        RunFolder.compute = lambda *arguments: (os.write(started, b"."), compute(*arguments))
        with open_run(out, manifest, Share()) as run:
            run_in_process(run, worker, Share())

    for kill in range(times):
        begun, started = os.pipe()
        child = os.fork()
        if child == 0:
            work(started)
            os._exit(0)
        os.close(started)
        if not os.read(begun, 1):
            raise SystemExit(f"the run was done after {kill} kills")
        time.sleep(rng.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
    print(f"{len(list(out.glob('*.parquet')))} shards done after {times} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
