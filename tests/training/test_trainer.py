"""Steps of training: what they learn, their settings, and a task's samples."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from stripes import QUICK, Stripes, SymbolStripes, TokenStripes, same_weights, with_samples

from ipr_fast.engine.capture_check import Watch
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.configs import config_of
from ipr_fast.training.run import train
from ipr_fast.training.trainer import DTYPES, Trainer, TrainSettings


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


@pytest.mark.parametrize(
    ("sample", "came"),
    [
        (lambda n: torch.zeros(n, 1, 8, 8).double(), r"a float64 tensor of shape \(16, 1, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 1, 16, 16), r"a float32 tensor of shape \(16, 1, 16, 16\) on cpu"),
        (lambda n: torch.zeros(n + 1, 1, 8, 8), r"a float32 tensor of shape \(17, 1, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 8, 8), r"a float32 tensor of shape \(16, 8, 8\) on cpu"),
        (lambda n: torch.zeros(n, 1, 8, 8, device="meta"), r"a float32 tensor of shape \(16, 1, 8, 8\) on meta"),
        (lambda n: torch.zeros(n, 1, 8, 8).to_sparse(), r"a float32 tensor of shape .* on cpu in torch\.sparse_coo"),
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


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda x: x.float(), r"an int64 tensor of shape \(16, 4\) on cpu, got a float32 tensor"),
        (lambda x: x[:, :3], r"an int64 tensor of shape \(16, 4\) on cpu, got an int64 tensor of shape \(16, 3\)"),
        (lambda x: x.tolist(), r"an int64 tensor of shape \(16, 4\) on cpu, got list"),
        (lambda x: x * 0 + 2, r"in 0\.\.1, got 2 to 2"),
        (lambda x: x * 0 - 100, r"in 0\.\.1, got -100 to -100"),
    ],
)
def test_symbols_that_are_none_of_the_tasks_are_refused(monkeypatch, change, came):
    sample = SymbolStripes.sample_with_symbols

    def changed(self, *arguments):
        samples, symbols = sample(self, *arguments)
        return samples, change(symbols)

    monkeypatch.setattr(SymbolStripes, "sample_with_symbols", changed)
    wanted = r"^task stripes: the symbols of sample_with_symbols\(\) must be "
    with pytest.raises(ValueError, match=f"{wanted}{came}"):
        Trainer(SymbolStripes(), QUICK).train_step()


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


def test_settings_may_be_numpys_numbers():
    integers = {"steps": 8, "batch_size": 2, "save_every": 3, "warmup": 0, "seed": 5}
    others = ("minutes", "learning_rate", "weight_decay", "ema_decay", "clip_norm", "symbol_weight", "mean_weight")
    numbers = dict.fromkeys((*others, "few_active", "own_patches"), 0.5)
    given = {name: np.int64(value) for name, value in integers.items()}
    settings = TrainSettings(**given, **{name: np.float32(value) for name, value in numbers.items()})
    assert json.loads(json.dumps(asdict(settings))) == asdict(TrainSettings(**integers, **numbers))


@pytest.mark.parametrize("name", [None, "", 5])
def test_a_task_without_a_name_is_refused(name):
    task = Stripes()
    task.name = name
    with pytest.raises(ValueError, match=f"^task must have a name, a str that is not empty, got {name!r}$"):
        Trainer(task, QUICK)


def test_the_mean_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"^mean_weight must be 0 for task token-stripes, .*, got 0\.5$"):
        Trainer(TokenStripes(), replace(QUICK, mean_weight=0.5))
