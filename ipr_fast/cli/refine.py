"""`ipr-fast refine`: refine samples that a model has made, in chunks that can be resumed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ipr_fast import files
from ipr_fast.cli.chunks import Work, content_hash, refine_in_chunks, run_folder
from ipr_fast.cli.common import (
    add_model,
    add_run_options,
    add_sampling,
    command,
    count,
    count_or_zero,
    device_of,
    load,
    model_from,
    path,
    sampling_of,
)
from ipr_fast.models.files.checkpoints import bundled_model_for
from ipr_fast.sampling.policies import random_patches

CHUNKS = 256, 4096  # samples that `refine` saves together, on a CPU and on a GPU


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "refine", run, "refine samples that a model has made")
    parser.add_argument("input", type=path, help=".npy, .npz, .pt (images (B, C, H, W)), or a folder of PNG files")
    parser.add_argument("--out", type=path, required=True, help=".npy, .npz, .pt, or a folder for PNG files")
    parser.add_argument("--iters", type=count_or_zero, default=50, help="iterations (default 50)")
    parser.add_argument("--first-iteration", type=count, default=1, help="number of the first one (default 1)")
    parser.add_argument("--ratio", type=float, default=0.25, help="alpha, the share of patches renoised (default 0.25)")
    parser.add_argument("--fixed-region", action="store_true", help="renoise the same random patches every iteration")
    parser.add_argument(
        "--noise", choices=("random", "fixed"), default="random", help="fixed: renoise with the initial noise each time"
    )
    on_cpu, on_gpu = CHUNKS
    parser.add_argument(
        "--chunk", type=count, help=f"samples that are saved together (default {on_cpu} on a CPU, {on_gpu} on a GPU)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what an ended run has left in OUT.partial")
    add_sampling(parser, "default the model's schedule to refine")
    add_model(parser, "default the bundled model whose sample shape fits")
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    device, samples = device_of(arguments), files.read_samples(arguments.input)
    images = samples.images
    if arguments.out.exists() and arguments.out.samefile(arguments.input):
        raise ValueError(
            "--out: is the input itself, and a run that ends while it writes could not go on; choose another"
        )
    files.check_writable(arguments.out, tuple(images.shape), samples.names)
    with model_from("--model"):
        default = arguments.model or bundled_model_for(tuple(images.shape[1:]))
    model = load(arguments, default, device)
    chunk = arguments.chunk or CHUNKS[device.type != "cpu"]
    options = sampling_of(arguments, device, len(images))
    work = Work(len(images), chunk, arguments.first_iteration, arguments.iters)
    settings = _settings(arguments, images, model, options) | {"chunk": chunk}
    partial = Path(f"{arguments.out}.partial")
    with run_folder(partial, settings, work, resume=arguments.resume) as folder:
        x = refine_in_chunks(
            images,
            random_patches(arguments.ratio, fixed=arguments.fixed_region),
            folder=folder,
            device=device,
            model=model,
            noise=arguments.noise,
            **options,
        )
        files.write_samples(arguments.out, files.Samples(x, samples.names, samples.depth))
    print(f"wrote {len(x)} refined samples to {arguments.out}")


def _settings(arguments: argparse.Namespace, images: torch.Tensor, model: torch.nn.Module, options: dict) -> dict:
    """What decides the result of `refine`, as JSON values: contents as their hashes."""
    names = ("iters", "first_iteration", "ratio", "fixed_region", "noise", "stochasticity", "temperature", "seed")
    known = options["known"]
    return {
        "input": content_hash(images),
        "model": content_hash(str(model.config), *(part for pair in model.state_dict().items() for part in pair)),
        "known": None if known is None else content_hash(known),
        **{name.replace("_", "-"): getattr(arguments, name) for name in names},
        "first-chain": arguments.first_chain,
        "schedule": str(options["schedule"] or model.refine_schedule),
        "dtype": arguments.dtype or "as stored",
        "tf32": arguments.tf32,
    }
