"""The models that are measured, and the cases in which they are compared with baselines/loops.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch

import ipr_fast
from ipr_fast import Denoiser, Schedule
from ipr_fast.models import PRESETS, PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig
from ipr_fast.sampling.policies import num_chosen

RATIO = 0.25

NINE_BY_NINE = PatchTransformerConfig(
    channels=1, image_size=252, patch_size=28, width=256, depth=8, num_heads=4, box_size=3
)
TINY = PatchTransformerConfig(channels=1, image_size=16, patch_size=4, width=32, depth=2, num_heads=2, box_size=2)
TINY_UNET = SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)


def makers(smoke: bool) -> dict[str, Callable[[], Denoiser]]:
    """Return a maker of each model on the CPU. Only 4x4 boards have trained weights: times do not depend on them."""
    if smoke:
        return {"4x4 transformer": lambda: random_transformer(TINY), "Even Pixels": lambda: random_unet(TINY_UNET)}
    return {
        "4x4 transformer": lambda: ipr_fast.load_model("digit-sudoku-4x4"),
        "9x9 transformer": lambda: random_transformer(NINE_BY_NINE),
        "Even Pixels": lambda: random_unet(PRESETS["even_pixels"]),
        "Counting Polygons": lambda: random_unet(PRESETS["counting_polygons"]),
        "MNIST Sudoku": lambda: random_unet(PRESETS["mnist_sudoku"]),
    }


class Case(NamedTuple):
    """One comparison: `batch` chains of a model against loops of bench/baselines/loops.py.

    most_steps: of an iteration. iters: per call of refine_batch, enough to make the cost of a call small, as in a
    refinement of fifty. needs: about how many seconds it takes. targets: the speed-ups aimed at.
    """

    subject: str
    batch: int
    against: tuple[str, ...] = ("one at a time", "batched")
    dtype: torch.dtype = torch.float32
    most_steps: int = 10
    iters: int = 1
    needs: float = 8.0
    targets: Mapping[str, float] = MappingProxyType({})

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.subject}, {self.batch}, {dtype}, against {' and '.join(self.against)}"


def cases(sizes: str) -> list[Case]:
    """Return the comparisons, the most important first, as time may run out; slow torch.compile mostly last."""
    if sizes == "smoke":
        small = [Case(name, batch, most_steps=4) for name in makers(smoke=True) for batch in (1, 3)]
        return small + [Case(name, 3, ("batched",), torch.bfloat16, 4) for name in makers(smoke=True)]
    if sizes == "small":
        return [
            Case("Even Pixels", 8, needs=60, targets={"one at a time": 4}),
            *(
                Case("4x4 transformer", batch, most_steps=16, iters=iters)
                for batch, iters in ((1, 5), (16, 3), (256, 1))
            ),
            Case("4x4 transformer", 16, ("compiled",), most_steps=16, iters=3, needs=45),
        ]
    bfloat16 = {"against": ("batched",), "dtype": torch.bfloat16}
    aims = {"one at a time": 200, "batched": 8}
    main = [
        Case("4x4 transformer", 4096, most_steps=16, iters=5, targets=aims),
        Case("Even Pixels", 256, needs=15, targets=aims | {"one at a time": 100}),
        Case("Even Pixels", 256, ("compiled",), needs=75, targets={"compiled": 2}),
        Case("9x9 transformer", 4096, needs=15, targets=aims),
        *(Case("4x4 transformer", batch, most_steps=16, iters=20) for batch in (1, 16, 256)),
        *(Case("Even Pixels", batch, iters=5) for batch in (1, 16)),
        *(Case("9x9 transformer", batch, iters=10) for batch in (1, 16, 256)),
        *(Case("MNIST Sudoku", batch, most_steps=5, needs=25) for batch in (1, 16)),
        Case("4x4 transformer", 4096, most_steps=16, iters=5, **bfloat16),
        Case("Even Pixels", 256, needs=15, **bfloat16),
        Case("9x9 transformer", 4096, needs=15, **bfloat16),
        Case("Even Pixels", 4096, most_steps=3, needs=40),
        Case("MNIST Sudoku", 256, ("one at a time",), most_steps=5, needs=150),
    ]
    late = [
        case._replace(against=("compiled",), needs=50 + case.needs, targets=MappingProxyType({}))
        for case in main
        if "batched" in case.against
        and case.dtype == torch.float32
        and (case.subject, case.batch) != ("Even Pixels", 256)
    ]
    return main + late


def shortened(own: Schedule, num_active: int, most_steps: int) -> Schedule:
    """Return the model's schedule with as many steps per patch as fit into `most_steps` steps.

    If one step per patch is too many, all patches go at once, in `most_steps` steps.
    """
    fitting = (replace(own, steps_per_patch=p) for p in range(own.steps_per_patch, 0, -1))
    fitting = (schedule for schedule in fitting if schedule.steps(num_active) <= most_steps)
    return next(fitting, Schedule(most_steps, 1.0))


def num_active(model: Denoiser, ratio: float = RATIO) -> int:
    """Return the number of patches that an iteration renoises without known patches."""
    return num_chosen(ratio, model.grid.num_patches)


def samples(model: Denoiser, batch: int, device: torch.device) -> torch.Tensor:
    """Return random images (batch, C, H, W) in [-1, 1]."""
    generator = torch.Generator(device).manual_seed(batch)
    return torch.randn(batch, *model.grid.sample_shape, generator=generator, device=device).clamp_(-1, 1)


def random_transformer(config: PatchTransformerConfig) -> PatchTransformer:
    """Return a transformer with all weights random: zeros would make all patches equally uncertain."""
    model, generator = PatchTransformer(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


def random_unet(config: SRMUNetConfig) -> SRMUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SRMUNet(config).eval().requires_grad_(False)
