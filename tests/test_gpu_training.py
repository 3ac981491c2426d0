"""Training on a GPU: `pytest -m gpu`. Skipped where there is none."""

from dataclasses import replace

import pytest
import torch

from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.configs import config_of
from ipr_fast.training.run import train
from ipr_fast.training.trainer import DTYPES, Trainer, TrainSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUICK = TrainSettings(steps=30, batch_size=32, warmup=5, save_every=10)
PLAIN = {dtype: replace(QUICK, dtype=dtype) for dtype in DTYPES}
COMPILED = {dtype: replace(QUICK, dtype=dtype, compile=True) for dtype in DTYPES}


def small_task(name):
    task = make_task(name)
    task.config = replace(config_of(task), width=64, depth=2, num_heads=2)
    return task


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_made_on_the_device_and_judged_there(name):
    task = make_task(name)
    images = task.sample(64, torch.Generator("cuda").manual_seed(0))
    report = task.judge()(images)
    assert images.is_cuda
    assert report.good.is_cuda
    assert report.good.float().mean() > 0.95  # the reader may misread a digit
    for found, expected in zip(report, task.judge()(images.cpu()), strict=True):
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TASKS)
def test_a_step_never_waits_for_the_device(name, dtype):
    trainer = Trainer(small_task(name), PLAIN[dtype], "cuda")
    trainer.train_step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_losses_are_the_plain_ones(dtype):
    settings = PLAIN[dtype], COMPILED[dtype]
    plain, fused = (Trainer(small_task("even-pixels"), each, "cuda") for each in settings)
    for _ in range(5):
        expected, losses = plain.train_step(), fused.train_step()
        # As in tests/training/test_trainer.py: a few roundings to bfloat16 at the most.
        assert losses.velocity.item() == pytest.approx(expected.velocity.item(), rel=0.03)


def test_a_run_is_resumed(tmp_path):
    task = small_task("digit-sudoku-9x9")
    train(task, COMPILED["bfloat16"], tmp_path, device="cuda", progress=False)
    trainer = Trainer(task, COMPILED["bfloat16"], "cuda")
    trainer.restore(tmp_path / "checkpoint.pt")
    assert trainer.is_done
    assert all(parameter.is_cuda for parameter in trainer.ema.parameters())
