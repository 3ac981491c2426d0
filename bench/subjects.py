"""The models that are measured on a GPU, and with how many chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import ipr_fast
from ipr_fast import Denoiser, Schedule
from ipr_fast.models import PRESETS, PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig

RATIO = 0.25
BASELINES = ("one at a time", "batched", "compiled")
ALL = ("ours", *BASELINES)

NINE_BY_NINE = PatchTransformerConfig(
    channels=1, image_size=252, patch_size=28, width=256, depth=8, num_heads=4, box_size=3
)
TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)
TINY_UNET = SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)


class Case(NamedTuple):
    """One comparison: so many chains of a model, an iteration of `most_steps` steps at the most, and who takes part."""

    subject: str
    batch: int
    arms: tuple[str, ...] = ("ours", "one at a time", "batched")
    dtype: torch.dtype = torch.float32
    most_steps: int = 10


def makers(smoke: bool) -> dict[str, Callable[[], Denoiser]]:
    """What makes each model, on the CPU. All but the 4x4 boards' have random weights: times do not depend on them."""
    if smoke:
        return {"4x4 transformer": lambda: random_transformer(TINY), "Even Pixels": lambda: random_unet(TINY_UNET)}
    return {
        "4x4 transformer": lambda: ipr_fast.load_model("digit-sudoku-4x4"),
        "9x9 transformer": lambda: random_transformer(NINE_BY_NINE),
        "Even Pixels": lambda: random_unet(PRESETS["even_pixels"]),
        "MNIST Sudoku": lambda: random_unet(PRESETS["mnist_sudoku"]),
    }


def cases(smoke: bool, on_gpu: bool) -> list[Case]:
    """What to compare, the most important first, since time may run out; torch.compile takes long: mostly last."""
    if smoke:
        arms = ALL if on_gpu else ALL[:3]
        small = [Case(name, batch, arms, most_steps=4) for name in makers(smoke) for batch in (1, 3)]
        return [*small, *(Case(name, 3, ("ours", "batched"), torch.bfloat16, 4) for name in makers(smoke))]
    bfloat16 = {"arms": ("ours", "batched"), "dtype": torch.bfloat16}
    main = [
        Case("4x4 transformer", 4096, most_steps=16),
        Case("Even Pixels", 256, ALL),
        Case("9x9 transformer", 4096),
        *(Case("4x4 transformer", batch, most_steps=16) for batch in (1, 16, 256)),
        *(Case("Even Pixels", batch) for batch in (1, 16)),
        *(Case("9x9 transformer", batch) for batch in (1, 16, 256)),
        *(Case("MNIST Sudoku", batch, most_steps=5) for batch in (1, 16)),
        Case("4x4 transformer", 4096, most_steps=16, **bfloat16),
        Case("Even Pixels", 256, **bfloat16),
        Case("9x9 transformer", 4096, **bfloat16),
        Case("Even Pixels", 4096, most_steps=3),
        Case("MNIST Sudoku", 256, most_steps=5),
        Case("MNIST Sudoku", 4096, most_steps=5),
    ]
    late = [
        Case(case.subject, case.batch, ("ours", "compiled"), most_steps=case.most_steps)
        for case in main
        if "compiled" not in case.arms and case.dtype == torch.float32
    ]
    return main + late


def shortened(own: Schedule, num_active: int, most_steps: int) -> Schedule:
    """The model's own schedule with as many steps a patch as fit into `most_steps` steps, at least one."""
    fitting = (p for p in range(own.steps_per_patch, 0, -1) if Schedule(p, own.overlap).steps(num_active) <= most_steps)
    return Schedule(next(fitting, 1), own.overlap)


def num_active(model: Denoiser) -> int:
    """The patches of a chain that an iteration renoises, where none are known."""
    return max(1, math.floor(RATIO * model.grid.num_patches))


def samples(model: Denoiser, batch: int, device: torch.device) -> torch.Tensor:
    """Images (batch, C, H, W) in [-1, 1]."""
    generator = torch.Generator(device).manual_seed(batch)
    return torch.randn(batch, *model.grid.sample_shape, generator=generator, device=device).clamp_(-1, 1)


def random_transformer(config: PatchTransformerConfig) -> PatchTransformer:
    """Every weight away from its start, which is zero in part: else all patches would be equally certain."""
    model, generator = PatchTransformer(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


def random_unet(config: SRMUNetConfig) -> SRMUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SRMUNet(config).eval().requires_grad_(False)
