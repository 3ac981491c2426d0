"""A run in a folder: model, log, end, and what it refuses."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from stripes import QUICK, Stripes, SymbolStripes, TokenStripes, same_weights

from ipr_fast import TokenSchedule, generate_batch
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.outputs import alone_in
from ipr_fast.training.run import train
from ipr_fast.training.trainer import Trainer, TrainSettings


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


def test_a_model_of_tokens_learns_its_task(tmp_path):
    path = train(TokenStripes(), replace(QUICK, steps=300, batch_size=64, warmup=20), tmp_path, progress=False)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Where all is masked, no position of a sample is known: an eighth of a batch's masked positions, ln 2 each.
    assert entries[0]["cross_entropy"] > entries[-1]["cross_entropy"] > 0.1 * math.log(2)
    x = generate_batch(20, model=load_model(path), schedule=TokenSchedule(order="random"))
    assert (x == x[:, :1]).all()
    assert x.unique().tolist() == [1, 2]


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


def test_what_a_recipe_made_of_other_weights_is_gone_once_the_run_goes_on(tmp_path):
    train(Stripes(), QUICK, tmp_path, progress=False)
    files = [tmp_path / "quality-even-pixels.json", tmp_path / "even-pixels.safetensors"]
    for path in files:
        path.write_text("{}")
    train(Stripes(), QUICK, tmp_path, resume=True, progress=False)  # has ended
    assert all(path.exists() for path in files)
    train(Stripes(), replace(QUICK, steps=41), tmp_path, resume=True, progress=False)
    assert not any(path.exists() for path in files)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_may_begin_where_gradients_are_off(tmp_path, mode):
    expected = load_model(train(Stripes(), QUICK, tmp_path / "usual", progress=False))
    with mode():
        path = train(Stripes(), QUICK, tmp_path / "off", progress=False)
    assert same_weights(load_model(path), expected)


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
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {entry["samples_per_second"] for entry in entries} == {settings.batch_size}
