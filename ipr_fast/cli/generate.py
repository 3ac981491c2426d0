"""`ipr-fast generate`: samples from noise in one pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

from ipr_fast import files
from ipr_fast.cli.common import (
    FILES,
    DtypeOption,
    RunOptions,
    load,
    model_option,
    option,
    path_option,
    tell,
    write,
)
from ipr_fast.cli.sampling_options import SamplingOptions
from ipr_fast.models import contract
from ipr_fast.refine import generate_batch
from ipr_fast.resolve import DEFAULT_MODEL
from ipr_fast.spaces import space_of


def run(
    *,
    out: Annotated[Path, path_option(FILES, ".npy, .npz, .pt, or a folder for PNG files.")],
    count: Annotated[int, option(FILES, "Samples to generate.", min=1)] = 64,
    known_values: Annotated[
        Path | None, path_option(FILES, "Samples that hold the values of the --known patches.")
    ] = None,
    sampling: SamplingOptions,
    model: Annotated[str, model_option()] = DEFAULT_MODEL,
    dtype: DtypeOption = None,
    run_options: RunOptions,
) -> None:
    """Generate samples from noise in one pass.

    Example: ipr-fast generate --count 64 --out boards.npy
    """
    device = run_options.checked_device()
    denoiser = load(model, dtype, device)
    space = space_of(denoiser)
    arguments = sampling.arguments(run_options, device, count, denoiser, "generate_schedule")
    files.check_writable(out, (count, *space.sample_shape), dtype=space.dtype)
    if (sampling.known is None) != (known_values is None):
        raise ValueError("--known and --known-values must be given together")
    values = None
    if known_values is not None:
        values = files.read_samples(known_values).fitting("--known-values", space.sample_shape).images.to(device)
    with warnings.catch_warnings():
        if space.dtype.is_floating_point:
            warnings.simplefilter("ignore", contract.NotFiniteWarning)  # it is told when the samples are written
        x = generate_batch(count, model=denoiser, known_values=values, **arguments)
    shown = write(out, files.Samples(x), denoiser)
    tell(out, x, f"samples{shown}")
