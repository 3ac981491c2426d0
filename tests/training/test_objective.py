import pytest
import torch
from small_models import TINY

from ipr_fast.models import PatchTransformer
from ipr_fast.training.objective import ETA, best_mix, compute_losses, draw, sample_levels, sample_roles


def test_roles_and_levels_are_as_diverse_as_promised(generator):
    roles = sample_roles(4000, 16, generator)
    count = roles.sum(1)
    assert count.min() >= 1
    assert (count == 16).float().mean().item() == pytest.approx(1 / 3 + 2 / 3 / 16, abs=0.04)
    levels = sample_levels(roles, generator)
    assert levels.min() == 0
    assert levels.max() == 1
    assert (levels[~roles] == 0).all()
    active = levels[roles]
    for share in ((active == 0), (active == 1), (active > 0) & (active < 1)):
        assert share.float().mean() > 0.1
    whole = levels[count == 16].mean(1)
    assert torch.histc(whole, 10, 0, 1).min() > 0.03 * len(whole)  # the means cover [0, 1]


def test_the_best_mix_makes_up_for_the_means_error():
    t, u = torch.full((5,), 0.8), torch.full((5,), 0.5)
    error = torch.tensor([0.0, 0.01, 0.1, 1.0, 1e6])
    mix, weight = best_mix(t, error, u)
    assert (weight == 1).all()
    assert mix[0] == 0
    assert mix[-1] == 1
    assert (mix.diff() >= 0).all()
    s, eta = 0.8 - (0.05 + 0.35 * 0.5), ETA
    r = ((1 - 0.8) * s / ((1 - s) * 0.8)) ** 2
    small, large = (eta * level * (1 - r) ** 0.5 for level in (s, 0.8))
    gamma = s * (1 - eta**2 * (1 - r)) ** 0.5
    wanted = small**2 + 0.01 * (gamma * 0.2 - (1 - s) * 0.8) ** 2
    assert (large ** mix[1] * small ** (1 - mix[1])).item() == pytest.approx(wanted**0.5, rel=1e-5)


def test_every_weight_gets_a_gradient(generator):
    model = PatchTransformer(TINY)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    clean = torch.randn(16, 16, 16, generator=generator)
    head = torch.nn.Linear(TINY.width, 3)

    def predict(*inputs):
        features = model.encode(*inputs)
        return model.read_out(features), head(features)

    symbols = torch.randint(3, (16, 16), generator=generator)
    losses = compute_losses(predict, clean, draw(clean.shape, generator), symbols)
    losses.total(symbol_weight=0.5).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (*model.parameters(), *head.parameters()))


def test_the_symbols_loss_is_the_cross_entropy_of_noisy_patches(generator):
    model, clean = PatchTransformer(TINY), torch.randn(4, 16, 16, generator=generator)
    drawn = draw(clean.shape, generator)
    logits, symbols = torch.randn(4, 16, 3, generator=generator), torch.randint(3, (4, 16), generator=generator)
    losses = compute_losses(lambda *inputs: (model.predict(*inputs), logits), clean, drawn, symbols)
    chosen = logits.log_softmax(-1).gather(-1, symbols[..., None]).squeeze(-1)
    assert losses.symbols.item() == pytest.approx(-chosen[drawn.levels > 0].mean().item(), rel=1e-5)
    without = compute_losses(lambda *inputs: (model.predict(*inputs), None), clean, drawn)
    assert without.symbols == 0
    assert without.total(0.5) == losses.total(0.0)
