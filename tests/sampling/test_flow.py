import math

import pytest
import torch

from ipr_fast.sampling import flow

LEVELS = [(1.0, 0.9), (0.9, 0.8), (0.5, 0.1), (0.1, 0.0), (1.0, 0.0), (1.0, 0.05), (0.02, 0.01)]


def by_hand(z, u, v, t, s, xi, eta, tau):
    """Compute the step in float64, formula by formula."""
    x0, eps = z - t * u, z + (1 - t) * u
    r = ((1 - t) * s / ((1 - s) * t)) ** 2
    gamma = s * math.sqrt(1 - eta**2 * (1 - r))
    small, large = eta * s * math.sqrt(1 - r), eta * t * math.sqrt(1 - r)
    sigma = math.exp(v * math.log(large) + (1 - v) * math.log(small)) if small > 0 else 0.0
    return (1 - s) * x0 + gamma * eps + tau * sigma * xi


@pytest.mark.parametrize(("t", "s"), LEVELS)
@pytest.mark.parametrize(("eta", "tau"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_posterior_step_equals_the_formula_in_float64(t, s, eta, tau):
    z, u, v, xi = 0.3, -1.2, 0.4, 0.8
    step = flow.posterior_step(
        *(torch.tensor(value, dtype=torch.float32) for value in (z, u, v, t, s, xi)), eta=eta, tau=tau
    )
    # 20 roundings of numbers below 4; the worst is in the ratio r, since 1 - t loses digits near t = 1.
    assert step.item() == pytest.approx(by_hand(z, u, v, t, s, xi, eta, tau), abs=20 * 4 * 2**-24)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.9, 0.4), (0.5, 0.1), (0.2, 0.0)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_of_a_flow_that_preserves_variance_is_one_in_its_own_units(t, s, eta):
    """Of z = a x + b eps with a^2 + b^2 = 1, by its formulas in float64: times a + b."""
    z, u, v, xi = 0.3, -1.2, 0.4, 0.8
    own = {
        level: ((1 - level) / math.hypot(level, 1 - level), level / math.hypot(level, 1 - level)) for level in (t, s)
    }
    (a, b), (a_next, b_next) = own[t], own[s]
    x0, eps = z - t * u, z + (1 - t) * u
    spread = eta * math.sqrt(1 - (a * b_next / (a_next * b)) ** 2)
    gamma, sigma = math.sqrt(b_next**2 - (b_next * spread) ** 2), spread * b**v * b_next ** (1 - v) if s else 0.0
    expected = (a_next * x0 + gamma * eps + sigma * xi) / (a_next + b_next)
    values = (torch.tensor(value, dtype=torch.float32) for value in (z, u, v, t, s, xi))
    step = flow.posterior_step(*values, eta=eta, preserving=True)
    assert step.item() == pytest.approx(expected, abs=20 * 4 * 2**-24)


def test_a_true_velocity_leads_back_to_the_sample():
    x, eps = torch.randn(2, 100)
    for t in (1.0, 0.7, 0.2):
        level = torch.tensor(t)
        z = flow.interpolate(x, eps, level)
        step = flow.posterior_step(z, eps - x, None, level, torch.tensor(0.0), torch.randn(100), eta=0.5)
        torch.testing.assert_close(step, x, atol=1e-6, rtol=1e-6)


def test_without_stochasticity_a_true_velocity_stays_on_the_line():
    x, eps = torch.randn(2, 100)
    z = flow.interpolate(x, eps, torch.tensor(0.8))
    step = flow.posterior_step(z, eps - x, None, torch.tensor(0.8), torch.tensor(0.3), torch.randn(100), eta=0.0)
    torch.testing.assert_close(step, flow.interpolate(x, eps, torch.tensor(0.3)), atol=1e-6, rtol=1e-6)


def test_with_a_true_velocity_the_step_has_the_flows_own_variance():
    """Without v the step preserves the law of z_t' = (1-t') x + t' eps: mean (1-t') x, variance t'**2."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    x, eps, xi = torch.full((n,), 0.4), *torch.randn(2, n, generator=generator)
    for eta in (0.3, 1.0):
        z = flow.interpolate(x, eps, torch.tensor(0.7))
        step = flow.posterior_step(z, eps - x, None, torch.tensor(0.7), torch.tensor(0.45), xi, eta=eta)
        assert step.mean().item() == pytest.approx(0.55 * 0.4, abs=5 * 0.45 / math.sqrt(n))
        assert step.var().item() == pytest.approx(0.45**2, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_patches_that_do_not_move_keep_their_bits(t):
    z = torch.randn(50)
    level = torch.tensor(t)
    step = flow.posterior_step(z, torch.randn(50), torch.rand(50), level, level, torch.randn(50), eta=0.5)
    assert torch.equal(step, z)


def test_no_noise_enters_the_last_step():
    z, u = torch.randn(2, 50)
    steps = [
        flow.posterior_step(z, u, torch.rand(50), torch.tensor(0.3), torch.tensor(0.0), torch.randn(50), eta=1.0)
        for _ in range(2)
    ]
    assert torch.equal(*steps)


def test_sigma_runs_from_small_to_large():
    t, s = torch.tensor(0.8), torch.tensor(0.5)
    spread = 0.5 * math.sqrt(1 - flow.ratio(t, s).item())
    assert flow.sigma(t, s, 0.5, torch.tensor(0.0)).item() == pytest.approx(0.5 * spread, rel=1e-6)
    assert flow.sigma(t, s, 0.5, torch.tensor(1.0)).item() == pytest.approx(0.8 * spread, rel=1e-6)
    assert flow.sigma(t, s, 0.5).item() == pytest.approx(0.5 * spread, rel=1e-6)
