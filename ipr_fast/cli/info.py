"""`ipr-fast info`: print versions, devices and bundled models, or describe a model file."""

from __future__ import annotations

import os
import platform
from typing import Annotated

import torch
import typer

import ipr_fast
from ipr_fast.cli.common import MODEL_SOURCE, model_from, printable
from ipr_fast.evaluation.environment import version
from ipr_fast.models.files.checkpoints import model_info
from ipr_fast.models.files.sources import bundled_models


def run(
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL_SOURCE}, or a .ckpt or .pt of an SRM UNet.", metavar="MODEL", show_default=False),
    ] = None,
) -> None:
    """Print versions, devices and the bundled models, or describe a model file.

    Example: ipr-fast info digit-sudoku-4x4
    """
    if model is not None:
        with model_from("model"):
            lines = _model_lines(model)
        for key, value in lines:
            print(f"{printable(key):13} {printable(value)}")
        return
    print(f"ipr-fast     {ipr_fast.__version__}")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "nvtx", "safetensors", "scikit-learn", "matplotlib", "pillow"):
        print(f"{package:12} {version(package) or 'not installed'}")
    print(f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}       {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda         no device: everything runs on the CPU")
    print("bundled models")
    width = max(map(len, bundled_models()))
    for name in bundled_models():
        info = model_info(name)
        shape, parameters = info["sample_shape"], info["parameters"]
        print(f"  {name:{width}}  {info['architecture']}, samples {shape}, {parameters:,} parameters")


def _model_lines(source: str) -> list[tuple[str, object]]:
    info = model_info(source)
    metadata = info.pop("metadata")
    info["sample_shape"] = info["sample_shape"] or "not in the file"
    if info["patch_shape"] is None:
        del info["patch_shape"]
    return [
        *info.items(),
        *((key, value) for key, value in sorted(metadata.items()) if key not in ("format", "architecture")),
    ]
