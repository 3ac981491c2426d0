"""Whole runs of the engine with its kernels, against the reference, which has none."""

import pytest
import torch

import ipr_fast
from ipr_fast import Schedule, random_patches
from ipr_fast.kernels import context_mask, group_norm, linear, modulated_norm, partial_attention, residual_norm
from ipr_fast.models import PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig, packed

MODELS = {
    "transformer": lambda: PatchTransformer(PatchTransformerConfig(1, 16, 4, width=32, depth=2, num_heads=2)),
    "pixels": lambda: PatchTransformer(PatchTransformerConfig(3, 16, 4, width=32, depth=1, num_heads=2, pixel_width=5)),
    "clean": lambda: PatchTransformer(PatchTransformerConfig(3, 16, 4, width=32, depth=1, num_heads=2, output="clean")),
    "unet": lambda: SRMUNet(SRMUNetConfig(3, 8, 4, (32, 32), (False, True), 1, 32, 32, 16)),
    "sequence": lambda: PatchTransformer(PatchTransformerConfig(2, (42,), 6, width=32, depth=1, num_heads=2)),
    "wide": lambda: PatchTransformer(PatchTransformerConfig(1, (4, 9), (2, 3), 32, 1, 2, pixel_width=5)),
    "video": lambda: PatchTransformer(PatchTransformerConfig(1, (4, 6, 6), (2, 2, 3), 32, 1, 2)),
    "wide unet": lambda: SRMUNet(SRMUNetConfig(1, (8, 12), (4, 6), (32, 32), (False, False), 1, 32, 32, 16)),
}
# The interpreter takes seconds for a UNet's call: a norm has a program for each group.
RUNS = [
    ("transformer", Schedule(1, 0.0)),
    ("transformer", Schedule(3, 0.8)),
    ("pixels", Schedule(1, 0.5)),
    ("clean", Schedule(2, 0.5)),
    ("unet", Schedule(1, 0.9)),
    ("sequence", Schedule(2, 0.5)),
    ("wide", Schedule(2, 0.5)),
    ("video", Schedule(2, 0.5)),
    ("wide unet", Schedule(1, 1.0)),
]


@pytest.mark.parametrize(("name", "schedule"), RUNS, ids=str)
def test_the_engine_equals_the_reference(name, schedule, device, generator, monkeypatch):
    torch.manual_seed(0)
    if device.type == "cpu" and (name, schedule) != RUNS[1]:  # the interpreter takes twice the time for linear layers
        monkeypatch.setattr(packed, "MIN_SPLIT_ROWS", 10**6)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    model, batch, grid = model.to(device), 5, model.grid
    number = torch.tensor([0, grid.num_patches, grid.num_patches - 1, 2, 5])[:, None]  # UNets have four patches
    known = (torch.rand(batch, grid.num_patches, generator=generator).argsort(1).argsort(1) < number).to(device)
    values = torch.randn(batch, *grid.sample_shape, generator=generator).clamp(-1, 1).to(device)

    def by_hand(x, iteration):
        mask = torch.zeros(batch, grid.num_patches, dtype=torch.bool, device=device)
        mask[:, iteration % 3 :: 3] = True
        return mask

    runs = []
    for backend in ("torch", "reference"):
        if backend == "reference":  # not the model's kernels either
            for file in (context_mask, group_norm, linear, modulated_norm, partial_attention, residual_norm):
                monkeypatch.setattr(file, "runs_kernel", lambda *_: False)
        options = {"model": model, "known": known, "backend": backend, "seed": 2**40 + 5, "schedule": schedule}
        x = ipr_fast.generate_batch(batch, known_values=values, **options)
        x = ipr_fast.refine_batch(x, random_patches(0.3), 1, **options)
        x = ipr_fast.refine_batch(x, random_patches(0.3, fixed=True), 1, noise="fixed", first_iteration=2, **options)
        runs.append(ipr_fast.refine_batch(x, by_hand, 1, first_iteration=7, **options))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)
    assert runs[0].isfinite().all()
