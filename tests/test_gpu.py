"""Checks that need a GPU: `pytest -m gpu`; skipped without one."""

import copy

import pytest
import torch

import ipr_fast
from ipr_fast import ActivePatches, Schedule, random_patches
from ipr_fast.cli.main import main
from ipr_fast.kernels import philox
from ipr_fast.models import SRMUNet, SRMUNetConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _full_precision():
    """Products in float32, not TF32: the CPU is the yardstick."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def test_random_numbers_are_those_of_the_cpu():
    ids, patches = torch.arange(64), torch.arange(81).repeat(64, 1)
    here = [philox.patch_keys(3, philox.STREAM_CHOICE, 2, ids, 81), philox.patch_normals(3, 2, 5, 2, ids, patches, 64)]
    ids, patches = ids.cuda(), patches.cuda()
    there = [philox.patch_keys(3, philox.STREAM_CHOICE, 2, ids, 81), philox.patch_normals(3, 2, 5, 2, ids, patches, 64)]
    assert torch.equal(here[0], there[0].cpu())
    torch.testing.assert_close(here[1], there[1].cpu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", [Schedule(3, 0.0), Schedule(10, 0.8)], ids=str)
def test_the_engine_equals_the_reference(finished, ragged_known, schedule, model):
    here = ipr_fast.refine_batch(
        finished, random_patches(), 3, model=model, known=ragged_known, schedule=schedule, backend="reference"
    )
    there = ipr_fast.refine_batch(
        finished.cuda(),
        random_patches(),
        3,
        model=copy.deepcopy(model).cuda(),
        known=ragged_known.cuda(),
        schedule=schedule,
    )
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_equals_itself_on_the_cpu(dtype, generator):
    torch.manual_seed(0)
    config = SRMUNetConfig(3, 28, 7, (64, 64, 128), (False, True, True), num_blocks=1, num_head_channels=32)
    here = SRMUNet(config).eval().requires_grad_(False)
    there = SRMUNet(config).eval().requires_grad_(False).to("cuda", dtype)
    there.load_state_dict(here.state_dict())
    patches, mask = torch.randn(6, 16, 147, generator=generator), torch.rand(6, 16, generator=generator) < 0.4
    active, levels = ActivePatches.from_mask(mask), torch.rand(6, 16, generator=generator)
    slots = ActivePatches(active.index.cuda(), active.count.cuda())
    found = there(patches.cuda(), levels.cuda(), slots)
    for ours, theirs in zip(found, here(patches, levels, active), strict=True):
        error = (ours.cpu().float() - theirs)[active.occupied].abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 8 * 2**-8) * theirs.abs().max()


def test_the_bundled_model_follows_the_samples():
    x = ipr_fast.generate_batch(64, device="cuda")
    refined = ipr_fast.refine_batch(x, random_patches(), 3)
    assert x.is_cuda
    assert refined.is_cuda
    apart = (x.cpu() - ipr_fast.generate_batch(64)).flatten(1).abs().amax(1)
    assert (apart > 1e-2).sum() <= 1  # two cells as uncertain as each other may change places


def test_the_demo_and_training_run_on_it(tmp_path):
    demo = ["demo", "--boards", "16", "--iters", "2", "--clues", "2", "4", "--out", str(tmp_path / "demo")]
    assert main([*demo, "--device", "cuda", "--quiet"]) == 0
    train = ["train", "--steps", "3", "--batch-size", "8", "--out", str(tmp_path / "run")]
    assert main([*train, "--device", "cuda", "--quiet"]) == 0
    assert main(["info", str(tmp_path / "run" / "model.safetensors")]) == 0


def test_bfloat16_runs():
    model = ipr_fast.load_model("digit-sudoku-4x4", device="cuda", dtype=torch.bfloat16)
    x = ipr_fast.generate_batch(64, model=model)
    assert ipr_fast.refine_batch(x, random_patches(), 3, model=model).isfinite().all()
