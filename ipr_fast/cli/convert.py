"""`ipr-fast convert`: a published checkpoint as .safetensors, with its configuration."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ipr_fast import outputs
from ipr_fast.cli.common import (
    DTYPES,
    MODEL,
    MODEL_SOURCE,
    STEPS_AND_OVERLAP,
    one_of,
    option,
    path,
    printable,
)
from ipr_fast.cli.sampling_options import schedule_of
from ipr_fast.models.files.checkpoints import load_model, model_info, save_model
from ipr_fast.models.srm_unet_config import PRESETS
from ipr_fast.models.token_transformer import TokenTransformer

SCHEDULES = "Schedules"  # a panel of `--help`


@dataclasses.dataclass(frozen=True)
class SizeOptions:
    """Sizes that cannot be inferred from the weights."""

    image_size: Annotated[str | None, option(MODEL, "Pixels of a sample: SIDE or HEIGHTxWIDTH.", metavar="SIDE")] = None
    patch_size: Annotated[str | None, option(MODEL, "Pixels of a patch: SIDE or HEIGHTxWIDTH.", metavar="SIDE")] = None
    num_head_channels: Annotated[int | None, option(MODEL, "Channels of an attention head.", min=1)] = None

    def given(self) -> dict[str, Any]:
        """Return the fields of an SRMUNetConfig that are given. Raises ValueError for a size that is none."""
        sides = {"image_size": self.image_size, "patch_size": self.patch_size}
        fields: dict[str, Any] = {name: _sides(name, text) for name, text in sides.items() if text is not None}
        return fields if self.num_head_channels is None else fields | {"num_head_channels": self.num_head_channels}


def run(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"{MODEL_SOURCE}, or a .ckpt or .pt of an SRM UNet.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=path, help="The .safetensors file to write.")],
    preset: Annotated[
        str | None, one_of(MODEL, "PRESET", "Published configuration, in place of the sizes below", PRESETS)
    ] = None,
    sizes: SizeOptions,
    dtype: Annotated[str | None, one_of(MODEL, "TYPE", "Type of the weights", DTYPES, show_default="as stored")] = None,
    generate_schedule: Annotated[
        tuple[str, str] | None, option(SCHEDULES, "The model's default to generate.", metavar=STEPS_AND_OVERLAP)
    ] = None,
    refine_schedule: Annotated[
        tuple[str, str] | None, option(SCHEDULES, "The model's default to refine.", metavar=STEPS_AND_OVERLAP)
    ] = None,
) -> None:
    """Write a published checkpoint as .safetensors, with its configuration.

    Example: ipr-fast convert sudoku.ckpt sudoku.safetensors --preset mnist_sudoku
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: must end in .safetensors")
    given = sizes.given()
    outputs.check_no_folders([out])
    if preset is not None and given:
        raise ValueError(f"--preset already sets {', '.join(given)}")
    metadata = model_info(source)["metadata"]
    if (preset or given) and "architecture" in metadata:
        named = "--preset" if preset else " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{named}: for checkpoints of an SRM UNet; {source} has its configuration")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ValueError(f"{out}: is the source; give another output file")
    model = load_model(source, config=preset or given or None, dtype=None if dtype is None else getattr(torch, dtype))
    generate = schedule_of("--generate-schedule", generate_schedule)
    refine = schedule_of("--refine-schedule", refine_schedule)
    schedules = {"generate_schedule": generate, "refine_schedule": refine}
    chosen: dict[str, Any] = {name: schedule.values for name, schedule in schedules.items() if schedule is not None}
    if chosen and isinstance(model, TokenTransformer):
        raise ValueError(f"{source}: a model of tokens has no schedule of patches, got {', '.join(chosen)}")
    model.config = dataclasses.replace(model.config, **chosen)
    outputs.prepare_folder(out.parent)
    save_model(model, out, **_kept(metadata), source=printable(Path(source).name))
    print(f"wrote {out}")


def _sides(name: str, text: str) -> int | tuple[int, int]:
    """Return "28" as 28, and "28x32" as (28, 32)."""
    found = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if found is None:
        raise ValueError(f"--{name.replace('_', '-')} must be a side, 28, or height and width, 28x32, got {text!r}")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _kept(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of the source to carry over; for a checkpoint, which of its weights were taken."""
    if "architecture" not in metadata:
        return {"weights": metadata["weights"]}
    return {key: value for key, value in metadata.items() if key not in ("format", "architecture", "config", "source")}
