"""Training on patches that the starting model made, in place of clean ones of the same symbols."""

from dataclasses import replace

import pytest
import torch
from stripes import QUICK, Stripes, SymbolStripes, TokenStripes, same_weights

from ipr_fast.engine.capture_check import Watch
from ipr_fast.models.files.checkpoints import load_model
from ipr_fast.training import own_patches
from ipr_fast.training.own_patches import OwnPatches, make_own_patches
from ipr_fast.training.run import train
from ipr_fast.training.trainer import Trainer

OWN = replace(QUICK, own_patches=0.75)


class ReadStripes(SymbolStripes):
    """Stripes whose symbols can be read: the sign of a patch's mean, and none where it is next to 0."""

    grid = Stripes.config.grid

    def read_symbols(self, samples):
        means = self.grid.to_patches(samples).mean(-1)
        return torch.where(means.abs() < 0.01, -1, (means > 0).long())


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(own_patches, "SAMPLES", 12)


@pytest.fixture
def start(few, tmp_path):
    """A model of stripes that has been trained for a moment."""
    return load_model(train(ReadStripes(), QUICK, tmp_path / "start", progress=False))


def numbered(symbols, num_symbols):
    """Own patches of 3 pixels, each filled with its number."""
    patches = torch.arange(float(len(symbols)))[:, None].expand(-1, 3)
    return OwnPatches.of(patches, torch.tensor(symbols), num_symbols)


def test_patches_are_sorted_by_symbol_and_those_without_one_dropped():
    own = numbered([2, 0, -1, 2, 5, 0, 3], 5)
    assert own.patches[:, 0].tolist() == [1, 5, 0, 3, 6]
    assert own.counts.tolist() == [2, 0, 2, 1, 0]
    assert own.firsts.tolist() == [0, 2, 2, 4, 5]


def test_only_clean_patches_are_replaced_by_ones_of_their_symbol(generator):
    own = numbered([i % 4 for i in range(20)], 5)  # symbol 4 has none
    clean = torch.full((4000, 10, 3), -1.0)
    symbols = torch.randint(0, 5, (4000, 10), generator=generator)
    levels = (torch.rand(4000, 10, generator=generator) < 0.5).float() * 0.001
    new = own.replace(clean, symbols, levels, 0.75, generator)
    assert (clean == -1).all()
    assert (new == new[..., :1]).all()
    number = new[..., 0]
    replaced = number >= 0
    assert not replaced[levels > 0].any()
    assert not replaced[symbols == 4].any()
    assert (number[replaced] % 4 == symbols[replaced]).all()
    assert (torch.bincount(number[replaced].long(), minlength=20) > 300).all()  # every own patch: 500 each expected
    may = (levels == 0) & (symbols < 4)
    share = (replaced & may).sum(1) / may.sum(1).clamp_min(1)
    assert replaced[may].float().mean().item() == pytest.approx(0.75 * 2 / 3, abs=0.02)  # E sqrt(u) = 2/3
    untouched = (share == 0)[may.sum(1) >= 6].float().mean().item()
    assert untouched == pytest.approx(0.25 + 0.75 * 2 / (7 * 8), abs=0.05)  # E (1 - sqrt(u))**6 = 2 / (7 * 8)
    assert torch.equal(own.replace(clean, symbols, levels, 0.0, generator), clean)


def test_a_model_makes_patches_of_the_symbols_that_are_read_in_them(start):
    own = make_own_patches(start, ReadStripes(), seed=3)
    assert own.counts.sum() == len(own.patches) <= 2 * 12 * 4
    assert own.counts.min() > 0
    signs = torch.repeat_interleave(torch.tensor([-1.0, 1.0]), own.counts)
    assert (own.patches.mean(-1).sign() == signs).all()
    again = make_own_patches(start, ReadStripes(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
    assert not torch.equal(own.patches[:9], make_own_patches(start, ReadStripes(), seed=4).patches[:9])


def test_what_is_learnt_stays_the_tasks_own(start):
    """The noisy patches of a batch, and its random numbers, are those of a run without own patches."""
    trainer, plain = (Trainer(ReadStripes(), settings, init=start) for settings in (OWN, QUICK))
    trainer.begin()
    batch, other = (each.objective.draw(500, torch.Generator().manual_seed(1)) for each in (trainer, plain))
    assert all(torch.equal(a, b) for a, b in zip(batch.drawn, other.drawn, strict=True))
    noisy = batch.drawn.levels > 0
    assert torch.equal(batch.clean[noisy], other.clean[noisy])
    changed = (batch.clean != other.clean).any(-1)
    assert changed[~noisy].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(batch.symbols, other.symbols)


@pytest.mark.parametrize("symbol_weight", [0.0, 0.5])
def test_a_resumed_run_has_the_same_own_patches(start, tmp_path, symbol_weight, monkeypatch):
    settings = replace(OWN, symbol_weight=symbol_weight)
    whole, first = (Trainer(ReadStripes(), settings, init=start) for _ in range(2))
    for _ in range(20):
        whole.train_step()
    for _ in range(10):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    monkeypatch.setattr(own_patches, "generate_batch", None)  # none are made again
    second = Trainer(ReadStripes(), settings)
    second.restore(tmp_path / "checkpoint.pt")
    for _ in range(10):
        second.train_step()
    assert same_weights(whole.model, second.model)
    plain = Trainer(ReadStripes(), replace(settings, own_patches=0.0), init=start)
    for _ in range(20):
        plain.train_step()
    assert not same_weights(whole.model, plain.model)


def test_a_step_does_not_synchronise_for_own_patches(start):
    trainer = Trainer(ReadStripes(), OWN, init=start)
    trainer.begin()
    trainer.objective.own.replace(*_batch(), 0.75, torch.Generator())
    with Watch("own patches", torch.device("cpu")):
        trainer.objective.own.replace(*_batch(), 0.75, torch.Generator())


def _batch():
    return torch.zeros(2, 4, 16), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)


def test_a_model_whose_patches_show_nothing_is_refused(start, monkeypatch):
    monkeypatch.setattr(ReadStripes, "read_symbols", lambda self, samples: torch.full((len(samples), 4), -1))
    with pytest.raises(ValueError, match=r"^own_patches: the task reads no symbol in the model's samples$"):
        make_own_patches(start, ReadStripes(), seed=3)


def test_symbols_of_another_form_are_refused(start, monkeypatch):
    monkeypatch.setattr(ReadStripes, "read_symbols", lambda self, samples: torch.zeros(len(samples), 3))
    wanted = r"^task stripes: read_symbols\(\) must return an int64 tensor of shape \(24, 4\) on cpu, got a float32"
    with pytest.raises(ValueError, match=wanted):
        make_own_patches(start, ReadStripes(), seed=3)


def test_runs_that_cannot_make_own_patches_are_refused(start, few, tmp_path):
    for task, init, problem in (
        (ReadStripes(), None, r"own_patches: needs a model of patches \(init\) whose weights the run starts from"),
        (TokenStripes(), Trainer(TokenStripes(), QUICK).model, "own_patches: needs a model of patches"),
        (SymbolStripes(), start, "own_patches must be 0 for task stripes, which cannot read"),
        (Stripes(), start, "own_patches must be 0 for task stripes, which cannot read"),
    ):
        with pytest.raises(ValueError, match=f"^{problem}"):
            train(task, OWN, tmp_path / "run", init=init, progress=False)
    assert not (tmp_path / "run").exists()
