"""A run that goes on from its checkpoint, and checkpoints that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from stripes import QUICK, PixelStripes, Stripes, SymbolStripes, TokenStripes, same_weights

from ipr_fast.models.files.checkpoints import load_model, model_info
from ipr_fast.training.run import train
from ipr_fast.training.trainer import Trainer, TrainSettings


def test_a_resumed_run_goes_on_from_its_checkpoint_whatever_its_init(tmp_path):
    init, other = (Trainer(Stripes(), replace(QUICK, seed=seed)).model for seed in (1, 2))
    model = load_model(train(Stripes(), QUICK, tmp_path, init=init, progress=False))
    assert same_weights(model, load_model(train(Stripes(), QUICK, tmp_path, resume=True, init=other, progress=False)))


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [(SymbolStripes(), "adamw"), (SymbolStripes(), "muon"), (PixelStripes(), "muon"), (TokenStripes(), "muon")],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, task, optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9 has no Muon")
    mean_weight = 0.0 if isinstance(task, TokenStripes) else 4.0
    settings = replace(QUICK, optimizer=optimizer, mean_weight=mean_weight, few_active=0.5)
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


def test_a_checkpoint_without_a_newer_setting_is_resumed(tmp_path):
    Trainer(Stripes(), QUICK).save(path := tmp_path / "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    del state["settings"]["own_patches"], state["own_patches"]
    torch.save(state, path)
    Trainer(Stripes(), QUICK).restore(path)
    with pytest.raises(ValueError, match=r"own_patches 0\.0 \(now 0\.5\)"):
        Trainer(Stripes(), replace(QUICK, own_patches=0.5)).restore(path)


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
    whole = path.read_bytes()
    middle = whole.index(b"/data/0") + 1000  # in the largest part: weights
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint .*data/0"):
        Trainer(Stripes(), QUICK).restore(path)
    path.write_bytes(whole[:1000])
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


@pytest.mark.parametrize(
    "line", ['{"foo": 1}', '{"step": "a"}', '{"step": Infinity}', "garbage}", "\x00\xff", "[" * 9999]
)
def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, line):
    train(Stripes(), QUICK, tmp_path, progress=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + line.encode("latin-1"))
    train(Stripes(), QUICK, tmp_path, resume=True, progress=False)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [40]


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


def test_a_run_may_be_resumed_with_another_interval_and_compiled(tmp_path):
    path = tmp_path / "checkpoint.pt"
    Trainer(Stripes(), QUICK).save(path)
    Trainer(Stripes(), replace(QUICK, save_every=3, compile=True)).restore(path)
    with pytest.raises(ValueError, match=r"dtype float32 \(now bfloat16\)"):
        Trainer(Stripes(), replace(QUICK, dtype="bfloat16")).restore(path)
