"""A run that is interrupted, killed or crashes while saving."""

import errno
import itertools
import os
import pkgutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from stripes import QUICK, Stripes, same_weights

from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.outputs import WRITING
from ipr_fast.training.run import train
from ipr_fast.training.trainer import Trainer


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, trainer = tmp_path / "checkpoint.pt", Trainer(Stripes(), QUICK)
    trainer.save(path)
    trainer.train_step()

    def crash(state, file):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space"):
        trainer.save(path)
    monkeypatch.undo()
    again = Trainer(Stripes(), QUICK)
    again.restore(path)
    assert again.step == 0


def test_a_killed_run_loses_at_most_one_interval(tmp_path):
    """SIGKILL in the middle of `ipr-fast train`, then --resume to the end."""
    pytest.importorskip("sklearn")
    out, every = tmp_path / "run", 4
    command = [sys.executable, "-m", "ipr_fast", "train", "--out", str(out), "--steps", "30", "--batch-size", "4"]
    command += ["--save-every", str(every), "--quiet", "--evaluate", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step % every == 0
    assert 0 < step < 30
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 30
    assert load_model(out / "model.safetensors").grid.sample_shape == (1, 32, 32)


def interrupt(monkeypatch, target, call):
    """Let the function's n-th call begin with a Ctrl-C."""
    owner, name = target.rsplit(".", 1)
    function, calls = getattr(pkgutil.resolve_name(owner), name), itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(target, interrupted)


@pytest.mark.parametrize(
    ("target", "call", "steps"),
    [
        ("ipr_fast.training.patch_objective.draw", 7, 6),
        ("torch.Tensor.backward", 8, 6),  # the first one counts operations
        ("torch.optim.AdamW.step", 7, 7),
        ("torch._foreach_lerp_", 7, 7),
        ("torch.save", 1, 8),  # of the checkpoint in the middle
        ("json.dumps", 2, 12),  # of the log; the first one is the checkpoint's
    ],
)
def test_an_interrupted_run_is_saved_after_a_whole_step_and_can_go_on(tmp_path, monkeypatch, target, call, steps):
    settings = replace(QUICK, steps=12, save_every=8)
    whole = train(Stripes(), settings, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        interrupt(patch, target, call)
        with pytest.raises(KeyboardInterrupt):
            train(Stripes(), settings, tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == steps
    assert not list(tmp_path.glob(f"run/*{WRITING}"))
    resumed = train(Stripes(), settings, tmp_path / "run", resume=True, progress=False)
    assert same_weights(load_model(whole), load_model(resumed))


def test_a_second_interrupt_does_not_wait_for_the_checkpoint(tmp_path, monkeypatch):
    interrupt(monkeypatch, "ipr_fast.training.patch_objective.draw", 4)
    interrupt(monkeypatch, "torch.save", 2)
    with pytest.raises(KeyboardInterrupt):
        train(Stripes(), replace(QUICK, save_every=2), tmp_path, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(f"*{WRITING}"))


def test_training_leaves_signals_alone_in_another_thread_and_where_they_are_ignored(tmp_path, monkeypatch):
    with ThreadPoolExecutor() as pool:
        pool.submit(train, Stripes(), replace(QUICK, steps=2), tmp_path / "thread", progress=False).result()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            interrupt(patch, "torch.optim.AdamW.step", 1)
            train(Stripes(), replace(QUICK, steps=2), tmp_path / "ignored", progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
