"""Make a bundled model from nothing: train it, store it in half precision, measure what refinement does to it.

    python bench/make_model.py digit-sudoku-9x9 --minutes 25 --out runs/9x9
    python bench/make_model.py even-pixels --minutes 25 --out runs/even-pixels --resume

Each recipe has the sizes for a GPU, and smaller ones for a CPU. The folder gets what `ipr-fast train` writes, then
NAME.safetensors, of at most 16 MiB, and quality-NAME.json. A run that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import quality
import script
import torch

from ipr_fast.cli.main import main as ipr_fast_command
from ipr_fast.evaluation import environment
from ipr_fast.files import write_json

LARGEST = 16 * 2**20  # bytes of a model that comes with the package


class Recipe(NamedTuple):
    """Options of `ipr-fast train` on a GPU and on a CPU, and how many clues the boards have that are measured."""

    gpu: str
    cpu: str
    clues: tuple[int, int] = (0, 0)


RECIPES = {
    "digit-sudoku-9x9": Recipe(
        gpu="--batch-size 1024 --learning-rate 1e-3 --warmup 1000 --dtype bfloat16 --compile --save-every 2000",
        cpu="--batch-size 64 --learning-rate 1.5e-3 --dtype bfloat16 --width 128 --depth 6 --num-heads 8 "
        "--save-every 200",
        clues=(0, 26),
    ),
    # To count pixels to the last one takes more than bfloat16's eight bits.
    "even-pixels": Recipe(
        gpu="--batch-size 512 --learning-rate 1e-3 --warmup 1000 --dtype tf32 --compile --save-every 2000",
        cpu="--batch-size 64 --learning-rate 2e-3 --width 96 --depth 5 --num-heads 6 --save-every 200",
    ),
}


def make(name: str, minutes: float, out: Path, resume: bool, count: int, iters: int, compared: int, device: str) -> int:
    """Run the recipe; returns an exit code."""
    recipe = RECIPES[name]
    options = (recipe.gpu if device.startswith("cuda") else recipe.cpu).split()
    command = ["train", "--task", name, "--minutes", str(minutes), "--out", str(out), "--device", device, *options]
    code = ipr_fast_command([*command, "--evaluate", "0", *["--resume"] * resume])
    model = out / f"{name}.safetensors"
    code = code or ipr_fast_command(["convert", str(out / "model.safetensors"), str(model), "--dtype", "float16"])
    if code:
        return code
    if model.stat().st_size > LARGEST:
        print(f"{model}: {model.stat().st_size:,} bytes are more than {LARGEST:,}", file=sys.stderr)
        return 1
    if count:
        measured = quality.measure(str(model), count, recipe.clues, iters, compared, list(quality.ARMS), device)
        results = {**measured, "model": name, "environment": environment.describe(torch.device(device))}
        write_json(out / f"quality-{name}.json", results)
        print(quality.report(results))
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--minutes", type=float, default=25.0, help="of training (default 25)")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    count = script.at_least(0)
    parser.add_argument("--count", type=count, default=2048, help="samples to measure, 0 for none (default 2048)")
    parser.add_argument("--iters", type=script.at_least(1), default=50, help="at alpha 0.25 (default 50)")
    parser.add_argument("--compared", type=script.at_least(1), default=20, help="of the other arms (default 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(make(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
