import errno
import itertools
import json
import math
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

from ipr_fast import TokenSchedule, Vocabulary, generate_batch
from ipr_fast.engine.capture_check import Watch
from ipr_fast.models import PatchTransformerConfig, TokenTransformerConfig
from ipr_fast.models.files.checkpoints import load_model, model_info
from ipr_fast.outputs import WRITING, alone_in
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.configs import config_of
from ipr_fast.training.run import train
from ipr_fast.training.trainer import DTYPES, Trainer, TrainSettings


class Stripes:
    """A task that a tiny model learns at once: every sample is all -1 or all +1."""

    name = "stripes"
    config = PatchTransformerConfig(channels=1, image_size=8, patch_size=4, width=16, depth=1, num_heads=1)

    def initialise(self, model):
        pass

    def sample(self, batch_size, generator):
        return (torch.randint(0, 2, (batch_size, 1, 1, 1), generator=generator) * 2.0 - 1).expand(-1, 1, 8, 8)


class SymbolStripes(Stripes):
    """The same task, which knows the sign of every patch."""

    num_symbols = 2

    def sample_with_symbols(self, batch_size, generator):
        samples = self.sample(batch_size, generator)
        return samples, (samples[:, 0, 0, :1] > 0).long().expand(-1, 4)


class TokenStripes:
    """A task of tokens that a tiny model learns at once: all of a sample's tokens are 1, or all 2."""

    name, vocabulary, length = "token-stripes", Vocabulary(3, 0), 6
    config = TokenTransformerConfig(vocabulary_size=3, mask_id=0, columns=6, width=16, depth=1, num_heads=1)

    def initialise(self, model):
        pass

    def sample(self, batch_size, generator):
        return torch.randint(1, 3, (batch_size, 1), generator=generator).expand(-1, 6)


class PixelStripes(Stripes):
    """The same task, for a model with a pixel head."""

    config = replace(Stripes.config, pixel_width=3)


QUICK = TrainSettings(steps=40, batch_size=16, warmup=5, save_every=10, seed=3)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_may_start_from_another_models_weights():
    first = Trainer(SymbolStripes(), QUICK)
    for _ in range(5):
        first.train_step()
    second = Trainer(SymbolStripes(), QUICK, init=first.model)
    assert same_weights(second.model, first.model)
    assert same_weights(second.ema, first.model)
    assert second.step == 0
    second.train_step()
    assert not same_weights(second.model, first.model)


def test_a_resumed_run_goes_on_from_its_checkpoint_whatever_its_init(tmp_path):
    init, other = (Trainer(Stripes(), replace(QUICK, seed=seed)).model for seed in (1, 2))
    model = load_model(train(Stripes(), QUICK, tmp_path, init=init, progress=False))
    assert same_weights(model, load_model(train(Stripes(), QUICK, tmp_path, resume=True, init=other, progress=False)))


def test_the_loss_falls_and_the_model_learns_the_task():
    trainer = Trainer(Stripes(), TrainSettings(steps=300, batch_size=64, warmup=20))
    losses = [trainer.train_step() for _ in range(300)]
    early, late = (torch.stack([x.velocity for x in part]).mean() for part in (losses[:20], losses[-20:]))
    assert late < 0.5 * early
    late_likelihood = torch.stack([x.log_variance for x in losses[-20:]]).mean()
    assert late_likelihood < torch.stack([x.log_variance for x in losses[:20]]).mean() - 0.3


def test_a_symbol_head_learns_and_is_not_saved(tmp_path):
    trainer = Trainer(SymbolStripes(), TrainSettings(steps=300, batch_size=64, warmup=20))
    losses = [trainer.train_step().symbols for _ in range(300)]
    assert torch.stack(losses[-20:]).mean() < 0.5 * torch.stack(losses[:20]).mean()
    plain = Trainer(Stripes(), TrainSettings(steps=300, batch_size=64, warmup=20))
    assert trainer.ema.state_dict().keys() == plain.ema.state_dict().keys()
    off = Trainer(SymbolStripes(), replace(QUICK, symbol_weight=0.0))
    assert off.symbol_head is None
    assert off.train_step().symbols == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
def test_muon_takes_the_layers_matrices_and_adamw_the_rest():
    trainer = Trainer(SymbolStripes(), replace(QUICK, optimizer="muon"))
    muon, adamw = trainer.optimizers
    in_muon = [p for group in muon.param_groups for p in group["params"]]
    in_adamw = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in in_muon} == {id(p) for p in trainer.model.layers.parameters() if p.ndim == 2}
    every = [*trainer.model.parameters(), *trainer.symbol_head.parameters()]
    assert sorted(map(id, (*in_muon, *in_adamw))) == sorted(map(id, every))
    before = [p.clone() for p in every]
    trainer.train_step()
    trainer.train_step()  # the read-out begins at zero: nothing behind it has a gradient in the first step
    changed = [not torch.equal(p, old) for p, old in zip(every, before, strict=True)]
    assert sum(changed) >= len(every) - 1  # the boxes' embedding may be missing


def test_muon_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"optimizer: muon needs torch >= 2\.9"):
        Trainer(Stripes(), replace(QUICK, optimizer="muon"))


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [(SymbolStripes(), "adamw"), (SymbolStripes(), "muon"), (PixelStripes(), "muon"), (TokenStripes(), "muon")],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, task, optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9 has no Muon")
    settings = replace(QUICK, optimizer=optimizer, mean_weight=4.0, few_active=0.5)
    whole, first = Trainer(task, settings), Trainer(task, settings)
    for _ in range(20):
        whole.train_step()
    for _ in range(10):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(task, settings)
    second.restore(tmp_path / "checkpoint.pt")
    for _ in range(10):
        second.train_step()
    assert second.step == whole.step == 20
    assert same_weights(whole.model, second.model)
    assert same_weights(whole.ema, second.ema)


def test_a_model_of_tokens_learns_its_task(tmp_path):
    path = train(TokenStripes(), replace(QUICK, steps=300, batch_size=64, warmup=20), tmp_path, progress=False)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Where all is masked, no position of a sample is known: an eighth of a batch's masked positions, ln 2 each.
    assert entries[0]["cross_entropy"] > entries[-1]["cross_entropy"] > 0.1 * math.log(2)
    x = generate_batch(20, model=load_model(path), schedule=TokenSchedule(order="random"))
    assert (x == x[:, :1]).all()
    assert x.unique().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x.float(), r"an int64 tensor of shape \(16, 6\) on cpu, got a float32"),
        (lambda x: x[:, :5], r"got an int64 tensor of shape \(16, 5\)"),
        (lambda x: x + 1, r"tokens in 0\.\.2, none of them the mask 0, got 2 to 3|got 3 to 3|got 2 to 2"),
        (lambda x: x * 0, "none of them the mask 0, got 96 masks"),
    ],
)
def test_samples_that_are_no_tokens_of_the_model_are_refused(monkeypatch, change, problem):
    sample = TokenStripes.sample
    monkeypatch.setattr(TokenStripes, "sample", lambda self, *arguments: change(sample(self, *arguments)))
    with pytest.raises(ValueError, match=f"^task token-stripes: sample.. must return .*{problem}"):
        Trainer(TokenStripes(), QUICK).train_step()


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


@pytest.mark.parametrize("done", [20, 40])
@pytest.mark.parametrize("end", [{"steps": 60}, {"steps": 41}, {"steps": None, "minutes": 60.0}])
def test_a_run_may_be_resumed_with_a_later_end(tmp_path, done, end):
    """From a finished run's checkpoint, or an unfinished one's; its rate is then that of a run with the new end."""
    first = Trainer(Stripes(), QUICK)
    for _ in range(done):
        first.train_step()
    first.seconds = 60.0
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(Stripes(), replace(QUICK, **end))
    second.restore(tmp_path / "checkpoint.pt")
    assert (second.step, second.seconds) == (done, 60)
    assert not second.is_done
    second.train_step()
    rates = {group["lr"] for optimizer in second.optimizers for group in optimizer.param_groups}
    assert rates == {replace(QUICK, **end).rate(done, 60.0)}
    assert rates.pop() > 0


def test_an_extended_run_goes_on_from_the_finished_one(tmp_path):
    train(Stripes(), QUICK, tmp_path, progress=False)
    short = load_model(tmp_path / "model.safetensors")
    path = train(Stripes(), replace(QUICK, steps=60), tmp_path, resume=True, progress=False)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [40, 50, 60]
    assert not same_weights(short, load_model(path))
    training = json.loads(model_info(path)["metadata"]["training"])
    assert training["steps"] == training["trained_steps"] == 60


@pytest.mark.parametrize(
    "end",
    [{"steps": 39}, {"steps": 1}, {"minutes": 0.5}, {"steps": None, "minutes": 1.0}, {"steps": 60, "minutes": 1.0}],
)
def test_an_end_before_what_is_done_is_refused(tmp_path, end):
    trainer = Trainer(Stripes(), QUICK)
    trainer.step, trainer.seconds = 40, 60.0
    trainer.save(tmp_path / "checkpoint.pt")
    settings = replace(QUICK, **end)
    told = f"has done 40 steps in 1 minutes and must end after that, got steps {settings.steps} and minutes "
    with pytest.raises(ValueError, match=f"{told}{settings.minutes}$"):
        Trainer(Stripes(), settings).restore(tmp_path / "checkpoint.pt")


def test_weights_that_are_not_finite_are_never_resumed(tmp_path):
    """A finished run would write them as its model at once."""
    train(Stripes(), QUICK, tmp_path, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["ema"]["patch_in.bias"][0] = float("nan")
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: its weights are not finite"):
        train(Stripes(), QUICK, tmp_path, resume=True, progress=False)


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
    with pytest.raises(ValueError, match=r"other settings: seed 3 \(now 4\)$"):
        Trainer(Stripes(), TrainSettings(**(vars(QUICK) | {"seed": 4}))).restore(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        Trainer(Stripes(), QUICK).restore(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Trainer(Stripes(), QUICK).restore(path)


def test_a_run_of_another_network_is_refused_in_one_line(tmp_path):
    """Of other heads too, whose weights have the same shapes."""
    path, other = tmp_path / "checkpoint.pt", Stripes()
    Trainer(Stripes(), QUICK).save(path)
    for sizes in ({"num_heads": 2}, {"width": 32}, {"depth": 2}, {"refine_schedule": (2, 0.5)}):
        other.config = replace(Stripes.config, **sizes)
        with pytest.raises(ValueError, match=rf"other settings: {next(iter(sizes))} [^\n]*$"):
            Trainer(other, QUICK).restore(path)


@pytest.mark.parametrize("damage", [{"seconds": float("nan")}, {"seconds": -1.0}, {"step": -1}])
def test_impossible_progress_is_refused(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    Trainer(Stripes(), QUICK).save(path)
    torch.save(torch.load(path, weights_only=True) | damage, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Trainer(Stripes(), QUICK).restore(path)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    path, trainer = tmp_path / "checkpoint.pt", Trainer(Stripes(), replace(QUICK, learning_rate=1e38, warmup=0))
    trainer.save(path)
    trainer.train_step()
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        trainer.save(path)
    trainer.restore(path)
    assert trainer.step == 0
    with pytest.raises(FloatingPointError):
        train(Stripes(), replace(QUICK, learning_rate=1e38, warmup=0), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("line", ['{"foo": 1}', '{"step": "a"}', "garbage}", "\x00\xff", "[" * 9999])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, line):
    train(Stripes(), QUICK, tmp_path, progress=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + line.encode("latin-1"))
    train(Stripes(), QUICK, tmp_path, resume=True, progress=False)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [40]


def test_a_folder_is_of_one_run(tmp_path):
    train(Stripes(), QUICK, tmp_path, progress=False)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors exists, without a checkpoint"):
        train(Stripes(), QUICK, tmp_path, progress=False)
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is at work there"):
        train(Stripes(), QUICK, tmp_path, progress=False)


def test_what_was_said_of_other_weights_is_gone(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    train(Stripes(), QUICK, tmp_path, progress=False)
    assert not (tmp_path / "evaluation.json").exists()


def test_slow_steps_are_saved_and_logged_by_the_clock(tmp_path, monkeypatch):
    """As if a step took forty seconds."""
    now, saved = [0.0], []
    monkeypatch.setattr("ipr_fast.training.run.time.monotonic", lambda: now.__setitem__(0, now[0] + 13.4) or now[0])
    monkeypatch.setattr(Trainer, "save", lambda trainer, path: saved.append(trainer.step))
    settings = replace(QUICK, steps=9, save_every=1000)
    train(Stripes(), settings, tmp_path, progress=False)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 9
    assert 2 <= len(saved) <= 9
    assert saved[-1] == 9


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


def test_a_budget_of_minutes_ends_a_run_with_a_rate_of_zero():
    settings = TrainSettings(steps=None, minutes=2, warmup=10, learning_rate=1.0)
    assert settings.progress(10**6, 60) == 0.5
    assert settings.progress(0, 120) == 1
    assert settings.rate(4, 0) == pytest.approx(0.5)  # warming up
    assert settings.rate(10, 59) == 1
    assert settings.rate(10, 90) == pytest.approx(0.5)
    assert settings.rate(10, 119.9) < 1e-4
    assert settings.rate(10, 130) == pytest.approx(0, abs=1e-12)  # the last step may end late
    both = TrainSettings(steps=100, minutes=2)
    assert both.progress(75, 30) == 0.75
    assert both.progress(25, 90) == 0.75


def test_the_time_to_compile_does_not_count(tmp_path, monkeypatch):
    """As if it took an hour, and a step a second; a resumed run compiles again."""
    now = [0.0]

    def slow_to_compile(function):
        durations = itertools.chain([3600.0], itertools.repeat(1.0))

        def compiled(*args):
            now[0] += next(durations)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", slow_to_compile)
    monkeypatch.setattr("ipr_fast.training.run.time.monotonic", lambda: now[0])
    settings = replace(QUICK, steps=None, minutes=0.5, compile=True)
    train(Stripes(), settings, tmp_path, progress=False)
    states = [torch.load(tmp_path / "checkpoint.pt", weights_only=True)]
    train(Stripes(), replace(settings, minutes=1.0), tmp_path, resume=True, progress=False)
    states.append(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert [state["seconds"] for state in states] == [30, 60]
    assert [state["step"] for state in states] == [1 + 30, 2 + 60]


def test_a_resumed_run_counts_the_minutes_that_it_had(tmp_path):
    settings = TrainSettings(steps=None, minutes=1e-3, batch_size=4, save_every=1)
    train(Stripes(), settings, tmp_path, progress=False)
    trainer = Trainer(Stripes(), settings)
    trainer.restore(tmp_path / "checkpoint.pt")
    assert trainer.seconds >= 0.06
    assert trainer.is_done
    steps = trainer.step
    train(Stripes(), settings, tmp_path, resume=True, progress=False)
    trainer.restore(tmp_path / "checkpoint.pt")
    assert trainer.step == steps
    described = model_info(tmp_path / "model.safetensors")["metadata"]
    assert described["task"] == "stripes"
    assert json.loads(described["training"])["trained_steps"] == steps


def test_products_in_bfloat16_train_as_well():
    """Weights, losses and gradients stay float32, and the losses are those of float32 to what bfloat16 holds."""
    plain, lower = (Trainer(Stripes(), replace(QUICK, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for _ in range(10):
        expected, losses = plain.train_step(), lower.train_step()
        assert losses.total().dtype == torch.float32
        # Eight bits of mantissa: each of a few roundings errs by 1/512 at most, of a velocity of about 1.
        assert losses.velocity.item() == pytest.approx(expected.velocity.item(), rel=0.03)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lower.model.parameters())
    assert not same_weights(plain.model, lower.model)


def test_a_compiled_step_is_the_plain_one(monkeypatch):
    """As far as is seen without a compiler: all of the losses goes through torch.compile, and nothing else."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    plain, fused = Trainer(Stripes(), QUICK), Trainer(Stripes(), replace(QUICK, compile=True))
    assert len(compiled) == 1
    plain.train_step(), fused.train_step()
    assert same_weights(plain.model, fused.model)


def test_a_run_may_be_resumed_with_another_interval_and_compiled(tmp_path):
    path = tmp_path / "checkpoint.pt"
    Trainer(Stripes(), QUICK).save(path)
    Trainer(Stripes(), replace(QUICK, save_every=3, compile=True)).restore(path)
    with pytest.raises(ValueError, match=r"dtype float32 \(now bfloat16\)"):
        Trainer(Stripes(), replace(QUICK, dtype="bfloat16")).restore(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TASKS)
def test_a_step_never_looks_at_its_data(name, dtype):
    """Data, noise, network, gradient, optimiser and moving average: the host of a GPU would have to wait."""
    pytest.importorskip("sklearn")
    task = make_task(name)
    task.config = replace(config_of(task), width=32, depth=1, num_heads=1)
    trainer = Trainer(task, replace(QUICK, batch_size=2, dtype=dtype))
    trainer.train_step()  # draws the grids and makes the optimiser's state
    with Watch("a training step", torch.device("cpu")):
        trainer.train_step()


def with_samples(sample):
    """The task Stripes with another `sample`, a function of the batch size."""
    task = Stripes()
    task.sample = lambda batch_size, generator: sample(batch_size)
    return task


@pytest.mark.parametrize(
    ("sample", "came"),
    [
        (lambda n: torch.zeros(n, 1, 8, 8).double(), r"a float64 tensor of shape \(16, 1, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 1, 16, 16), r"a float32 tensor of shape \(16, 1, 16, 16\) on cpu"),
        (lambda n: torch.zeros(n + 1, 1, 8, 8), r"a float32 tensor of shape \(17, 1, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 8, 8), r"a float32 tensor of shape \(16, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 1, 8, 8, device="meta"), r"a float32 tensor of shape \(16, 1, 8, 8\) on meta"),
        (lambda n: [0.0] * n, "list"),
    ],
)
def test_samples_of_another_form_are_refused_in_every_step(sample, came):
    begun = Trainer(Stripes(), QUICK)
    begun.train_step()
    wanted = r"task stripes: sample\(\) must return a float32 tensor of shape \(16, 1, 8, 8\) on cpu, got "
    for refused in (begun, Trainer(Stripes(), QUICK)):
        refused.objective.task = with_samples(sample)
        with pytest.raises(ValueError, match=f"^{wanted}{came}$"):
            refused.train_step()


@pytest.mark.parametrize(
    ("value", "came"),
    [(float("nan"), "NaN or inf in 16 of 16 samples"), (float("inf"), "NaN or inf in 16"), (255.0, "from 255 to 255")],
)
def test_values_out_of_range_are_refused_in_the_first_step_and_after_a_resume(tmp_path, value, came):
    bad, good = with_samples(lambda n: torch.full((n, 1, 8, 8), value)), Stripes()
    with pytest.raises(ValueError, match=rf"task stripes: sample\(\) must return finite values .*{came}"):
        train(bad, QUICK, tmp_path / "new", progress=False)
    train(good, replace(QUICK, steps=1), tmp_path / "old", progress=False)
    resumed = Trainer(bad, replace(QUICK, steps=1))
    resumed.restore(tmp_path / "old" / "checkpoint.pt")
    with pytest.raises(ValueError, match=came):
        resumed.train_step()


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used: "):
        Trainer(Stripes(), QUICK, device)


def test_values_may_leave_the_range_by_rounding():
    Trainer(with_samples(lambda n: torch.full((n, 1, 8, 8), 1 + 5e-7)), QUICK).train_step()


def test_a_task_may_say_how_a_model_begins():
    class Zeroed(Stripes):
        def initialise(self, model):
            torch.nn.init.zeros_(model.patch_in.weight)

    trainer = Trainer(Zeroed(), QUICK)
    assert not trainer.model.patch_in.weight.any()
    assert not trainer.ema.patch_in.weight.any()


def test_a_model_trains_in_training_mode_and_its_average_does_not():
    class LeftInEvaluation(Stripes):
        def initialise(self, model):
            model.eval()

    trainer = Trainer(LeftInEvaluation(), QUICK)
    trainer.train_step()
    assert trainer.model.training
    assert not trainer.ema.training


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"ema_decay": 1.0},
        {"learning_rate": 0.0},
        {"minutes": 0},
        {"minutes": -1.0},
        {"dtype": "float16"},
        {"steps": None},
        {"steps": "5"},
        {"steps": float("nan")},
        {"steps": True},
        {"batch_size": 2.5},
        {"save_every": None},
        {"learning_rate": None},
        {"clip_norm": "x"},
        {"weight_decay": float("nan")},
        {"warmup": -5},
        {"seed": None},
        {"seed": 2**64},
        {"compile": "no"},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainSettings(**bad)
