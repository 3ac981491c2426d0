import math

import pytest
import torch
from small_models import PIXELS, TINY

from ipr_fast import Prediction
from ipr_fast.models import PatchTransformer
from ipr_fast.training.objective import ETA, best_mix, compute_losses, draw, mean_error, sample_levels, sample_roles


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


def test_few_active_patches_are_log_uniform(generator):
    """All patches in a third of the samples; of the others, half uniform and half log-uniform."""
    counts = [sample_roles(20_000, 64, generator, few).sum(1) for few in (0.5, 1.0)]
    for count, few in zip(counts, (0.5, 1.0), strict=True):
        assert count.min() == 1
        assert count.max() == 64
        for most in (1, 4, 16):
            expected = 2 / 3 * ((1 - few) * most / 64 + few * math.log(most + 1, 64))
            assert (count <= most).float().mean().item() == pytest.approx(expected, abs=0.015)


def test_the_draws_without_few_active_patches_are_what_they_were():
    """So that a run with the defaults can be resumed by later versions."""
    roles, plain = (sample_roles(50, 16, torch.Generator().manual_seed(5), *few) for few in ((), (0.0,)))
    assert torch.equal(roles, plain)


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


@pytest.mark.parametrize("config", [TINY, PIXELS], ids=["linear", "pixels"])
def test_every_weight_gets_a_gradient(config, generator):
    model = PatchTransformer(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    clean = torch.randn(16, 16, config.grid.patch_numel, generator=generator)
    head = torch.nn.Linear(config.width, 3)

    def predict(*inputs):
        features = model.encode(*inputs)
        return model.read_out(features, *inputs[:2]), head(features)

    symbols = torch.randint(3, (16, 16), generator=generator)
    drawn = draw(clean.shape, generator)
    losses = compute_losses(predict, clean, drawn, symbols, channels=config.channels)
    losses.total(symbol_weight=0.5, mean_weight=2.0).backward()
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


def test_the_mean_error_is_that_of_the_predicted_clean_mean(generator):
    """Two channels of three pixels in each of four patches; the second patch is context, the third clean."""
    levels = torch.tensor([[1.0, 0.0, 0.0, 0.5]])
    error = torch.randn(1, 4, 6, generator=generator)
    clean_error = error[0] * levels[0, :, None]
    expected = sum(clean_error[:, first : first + 3].sum().square() / (3 * 2) for first in (0, 3)) / 2
    assert mean_error(error, levels[..., None], 2).item() == pytest.approx(expected.item(), rel=1e-5)
    together = mean_error(torch.cat([error, 2 * error]), levels[..., None].expand(2, -1, -1), 2)
    assert together.item() == pytest.approx(2.5 * expected.item(), rel=1e-5)  # (1 + 2**2) / 2
    assert mean_error(error, torch.zeros(1, 4, 1), 2) == 0


def test_the_mean_error_is_of_what_the_noise_cannot_tell(generator):
    """Errors that cancel count for nothing there, and constant ones in full."""
    level = torch.full((3, 4, 1), 0.7)
    error = torch.randn(3, 4, 10, generator=generator)
    cancelling = error - error.mean((1, 2), keepdim=True)
    assert mean_error(cancelling, level, 1) < 1e-12
    assert mean_error(torch.full_like(error, 0.3), level, 1).item() == pytest.approx(40 * 0.21**2, rel=1e-5)


def test_the_exact_posterior_mean_has_the_least_mean_error(generator):
    """Of two pixels of opposite sign; a prediction for each pixel alone is as good for the velocity's loss only."""
    sign = torch.randint(2, (4000, 1, 1), generator=generator) * 2.0 - 1
    clean = torch.cat([sign, -sign], dim=1)
    t = torch.tensor([[1.0, 0.0]]).expand(4000, 2)
    noise = torch.randn(clean.shape, generator=generator)
    drawn = draw(clean.shape, generator)._replace(levels=t, is_active=t > 0, noise=noise)

    def exact(patches, levels, is_active):
        x = torch.cat([-patches[:, 1:], patches[:, 1:]], dim=1)  # from the other pixel, which is context
        return Prediction(patches - x, torch.full_like(x, 0.5), torch.zeros(x.shape[:2])), None

    def alone(patches, levels, is_active):
        return Prediction(patches, torch.full_like(patches, 0.5), torch.zeros(patches.shape[:2])), None

    assert compute_losses(exact, clean, drawn).mean == 0
    assert compute_losses(alone, clean, drawn).mean.item() == pytest.approx(1.0, rel=1e-5)
