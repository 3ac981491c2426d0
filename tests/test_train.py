import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ipr_fast.models import PatchTransformerConfig
from ipr_fast.models.checkpoints import load_model
from ipr_fast.train import Trainer, TrainSettings, train


class Stripes:
    """A task that a tiny model learns at once: every sample is all -1 or all +1."""

    name = "stripes"
    config = PatchTransformerConfig(channels=1, image_size=8, patch_size=4, width=16, depth=1, num_heads=1)

    def initialise(self, model):
        pass

    def sample(self, batch_size, generator):
        return (torch.randint(0, 2, (batch_size, 1, 1, 1), generator=generator) * 2.0 - 1).expand(-1, 1, 8, 8)


QUICK = TrainSettings(steps=40, batch_size=16, warmup=5, save_every=10, seed=3)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loss_falls_and_the_model_learns_the_task():
    trainer = Trainer(Stripes(), TrainSettings(steps=300, batch_size=64, warmup=20))
    losses = [trainer.train_step() for _ in range(300)]
    early, late = (torch.stack([x.velocity for x in part]).mean() for part in (losses[:20], losses[-20:]))
    assert late < 0.5 * early
    late_likelihood = torch.stack([x.log_variance for x in losses[-20:]]).mean()
    assert late_likelihood < torch.stack([x.log_variance for x in losses[:20]]).mean() - 0.3


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole, first = Trainer(Stripes(), QUICK), Trainer(Stripes(), QUICK)
    for _ in range(20):
        whole.train_step()
    for _ in range(10):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(Stripes(), QUICK)
    second.restore(tmp_path / "checkpoint.pt")
    for _ in range(10):
        second.train_step()
    assert second.step == whole.step == 20
    assert same_weights(whole.model, second.model)
    assert same_weights(whole.ema, second.ema)


def test_seeds_decide(tmp_path):
    runs = [Trainer(Stripes(), TrainSettings(**(vars(QUICK) | {"seed": seed}))) for seed in (1, 1, 2)]
    for run in runs:
        run.train_step()
    assert same_weights(runs[0].model, runs[1].model)
    assert not same_weights(runs[0].model, runs[2].model)


def test_train_writes_a_model_that_loads(tmp_path):
    path = train(Stripes(), QUICK, tmp_path / "run", progress=False)
    assert load_model(path).config == Stripes.config
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match=r"out: .*checkpoint\.pt exists; resume"):
        train(Stripes(), QUICK, tmp_path / "run", progress=False)
    assert train(Stripes(), QUICK, tmp_path / "run", resume=True, progress=False) == path


def test_the_log_follows_the_weights(tmp_path):
    """What a killed run logged beyond its checkpoint is dropped, and a new run starts a new log."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 50}\n')
    train(Stripes(), QUICK, tmp_path, progress=False)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [40]
    log.write_text('{"step": 40}\n{"step": 90}\n{"step": 95, "vel')
    train(Stripes(), QUICK, tmp_path, resume=True, progress=False)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [40]


def test_foreign_checkpoints_are_refused(tmp_path):
    path, trainer = tmp_path / "checkpoint.pt", Trainer(Stripes(), QUICK)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        trainer.restore(path)
    trainer.save(path)
    state = torch.load(path, weights_only=True)
    del state["model"]["patch_in.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="its state does not fit the model"):
        trainer.restore(path)


def test_checkpoints_of_other_runs_and_broken_ones_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    Trainer(Stripes(), QUICK).save(path)
    with pytest.raises(ValueError, match=r"other settings: .*seed 3 \(now 4\)"):
        Trainer(Stripes(), TrainSettings(**(vars(QUICK) | {"seed": 4}))).restore(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        Trainer(Stripes(), QUICK).restore(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Trainer(Stripes(), QUICK).restore(path)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, trainer = tmp_path / "checkpoint.pt", Trainer(Stripes(), QUICK)
    trainer.save(path)
    trainer.train_step()

    def crash(state, file):
        file.write_bytes(b"half a file")
        raise OSError("no space left on device")

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
    command += ["--save-every", str(every), "--quiet"]
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


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 0}, {"ema_decay": 1.0}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainSettings(**bad)
