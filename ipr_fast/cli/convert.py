"""`ipr-fast convert`: a published checkpoint as .safetensors, with its configuration."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ipr_fast import files
from ipr_fast.cli.common import A_MODEL, DTYPES, SCHEDULE, command, count, path, printable, schedule_of
from ipr_fast.models.files.checkpoints import load_model, model_info, save_model
from ipr_fast.models.srm_unet_config import PRESETS


def add(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "convert", run, "write a published checkpoint as .safetensors, with its configuration")
    parser.add_argument("source", help=f"a .ckpt or .pt of an SRM UNet, or {A_MODEL}")
    parser.add_argument("out", type=path, help="the .safetensors file to write")
    parser.add_argument("--preset", choices=PRESETS, help="the network's published configuration")
    for name, meaning in (
        ("image_size", "pixels of a sample's side"),
        ("patch_size", "pixels of a patch's side"),
        ("num_head_channels", "channels of an attention head"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=count, help=f"{meaning}, where there is no preset")
    for name in ("generate", "refine"):
        parser.add_argument(f"--{name}-schedule", **SCHEDULE, help=f"the model's default to {name}")
    parser.add_argument("--dtype", choices=DTYPES, help="default as stored")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".safetensors":
        raise ValueError(f"{arguments.out}: must end in .safetensors")
    given = {name: getattr(arguments, name) for name in ("image_size", "patch_size", "num_head_channels")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.preset is not None and given:
        raise ValueError(f"--preset says already what {', '.join(given)} is")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model = load_model(arguments.source, config=arguments.preset or given or None, dtype=dtype)
    for name in ("generate_schedule", "refine_schedule"):
        schedule = schedule_of(f"--{name.replace('_', '-')}", getattr(arguments, name))
        if schedule is not None:
            pair = (schedule.steps_per_patch, schedule.overlap)
            model.config = dataclasses.replace(model.config, **{name: pair})
    files.prepare_folder(arguments.out.parent)
    save_model(model, arguments.out, **_kept_metadata(arguments.source), source=printable(Path(arguments.source).name))
    print(f"wrote {arguments.out}")


def _kept_metadata(source: str) -> dict[str, str]:
    """What a file says of itself beside what `save_model` writes; of a checkpoint, which weights were taken."""
    metadata = model_info(source)["metadata"]
    if "architecture" not in metadata:
        return {"weights": metadata["weights"]}
    return {key: value for key, value in metadata.items() if key not in ("format", "architecture", "config", "source")}
