"""`ipr-fast generate`: samples from noise in one pass."""

from __future__ import annotations

import argparse

from ipr_fast import files
from ipr_fast.cli.common import (
    add_model,
    add_run_options,
    add_sampling,
    command,
    count,
    device_of,
    load,
    path,
    sampling_of,
)
from ipr_fast.refine import DEFAULT_MODEL, generate_batch


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "generate", run, "generate samples from noise in one pass")
    parser.add_argument("--count", type=count, default=64, help="samples to generate (default 64)")
    parser.add_argument("--out", type=path, required=True, help=".npy, .npz, .pt, or a folder for PNG files")
    parser.add_argument("--known-values", type=path, help="samples that hold the values of the known patches")
    add_sampling(parser, "default the model's schedule to generate")
    add_model(parser, f"default {DEFAULT_MODEL}")
    add_run_options(parser)


def run(arguments: argparse.Namespace) -> None:
    device = device_of(arguments)
    model = load(arguments, DEFAULT_MODEL, device)
    files.check_writable(arguments.out, (arguments.count, *model.grid.sample_shape))
    if (arguments.known is None) != (arguments.known_values is None):
        raise ValueError("--known and --known-values must be given together")
    values = None if arguments.known_values is None else files.read_samples(arguments.known_values).images.to(device)
    x = generate_batch(
        arguments.count,
        model=model,
        known_values=values,
        **sampling_of(arguments, device, arguments.count),
    )
    files.write_samples(arguments.out, files.Samples(x))
    print(f"wrote {len(x)} samples to {arguments.out}")
