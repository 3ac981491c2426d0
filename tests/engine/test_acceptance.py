"""Acceptance by a reward: the rule in both engines, the laws of chains, and what users can do wrong."""

import itertools
import math

import pytest
import torch
from gaussian_mixture import MEAN, STD, ExactDenoiser, draw
from small_token_models import Lookup, Oracle
from token_laws import distance, metropolis, reward_of, stationary, tilted

import ipr_fast
from ipr_fast import Metropolis, Schedule, TokenSchedule, all_patches, generate_batch, random_patches, refine_batch
from ipr_fast.sampling import acceptance

BATCH, ITERS, POLICY = 12, 4, random_patches(0.4)
ALMOST_NEVER = 5.0  # standard deviations


def brightness(x):
    return x.float().flatten(1).mean(1)


@pytest.fixture(params=["patches", "tokens"])
def problem(request, model, finished):
    """A model's samples and the arguments of a call."""
    if request.param == "patches":
        return finished, {"model": model, "schedule": Schedule(2, 0.5)}
    tokens = generate_batch(BATCH, model=Lookup(), schedule=TokenSchedule(3))
    return tokens, {"model": Lookup(), "schedule": TokenSchedule(3)}


def refine(problem, accept, rows=slice(None), iters=ITERS, **options):
    x, arguments = problem
    arguments = {"seed": 5, "chain_ids": torch.arange(BATCH)[rows], **arguments, **options}
    return refine_batch(x[rows], POLICY, iters, accept=accept, **arguments)


@pytest.mark.parametrize("temperature", [0.0, 0.1, lambda iteration: 0.2 / iteration], ids=["greedy", "0.1", "falling"])
@pytest.mark.parametrize("keep_best", [False, True])
def test_engine_and_reference_take_the_same_decisions_however_chains_are_run(problem, temperature, keep_best):
    rule = Metropolis(brightness, temperature, keep_best=keep_best)
    expected = refine(problem, rule, backend="reference")
    last, rows = rule.last, torch.tensor([7, 0, 3])
    for options in ({}, {"max_chains": 1}, {"max_chains": 5}):
        torch.testing.assert_close(refine(problem, rule, **options), expected)
        torch.testing.assert_close(rule.last.reward, last.reward)
        assert torch.equal(rule.last.accepted, last.accepted)
    assert 0 < int(last.accepted.sum()) < int(last.proposed.sum()) == BATCH * ITERS
    torch.testing.assert_close(refine(problem, rule, rows), expected[rows])
    torch.testing.assert_close(brightness(expected).double(), last.reward)


def test_a_chain_that_rejects_keeps_its_sample_bit_for_bit(problem):
    x, _ = problem
    seen, states = [], []

    def reward(proposal):
        seen.append(proposal)
        return brightness(proposal)

    out = refine(problem, Metropolis(reward), callback=lambda iteration, x: states.append(x))
    assert torch.equal(seen[0], x)
    before = x
    for proposal, after in zip(seen[1:], states, strict=True):
        accepted = brightness(proposal) >= brightness(before)
        assert torch.equal(after[accepted], proposal[accepted])
        assert torch.equal(after[~accepted], before[~accepted])
        before = after
    assert torch.equal(out, states[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_samples_of_another_type_that_are_never_accepted_keep_their_bits(model, finished, dtype):
    x, calls = (finished.double() + 1e-9).to(dtype), itertools.count()  # in float64 not representable in float32
    out = refine_batch(x, POLICY, 3, model=model, accept=Metropolis(lambda x: torch.full((len(x),), -next(calls))))
    assert torch.equal(out, x)


def test_a_best_sample_of_float64_that_was_the_first_one_keeps_its_bits(model, finished):
    """Though all proposals are accepted later, as they are as good as each other."""
    x, calls = finished.double() + 1e-9, itertools.count()

    def reward(x):
        return torch.full((len(x),), 1.0 if next(calls) == 0 else 0.0)

    rule = Metropolis(reward, 1e300, keep_best=True)
    assert torch.equal(refine_batch(x, POLICY, 3, model=model, accept=rule), x)
    assert torch.equal(rule.last.accepted, rule.last.proposed)


def test_the_best_sample_is_returned_if_asked_for(problem):
    seen = []

    def callback(iteration, x):
        seen.append(x)

    last = refine(problem, Metropolis(brightness, 0.1), callback=callback)
    states = [problem[0], *seen]
    best = refine(problem, Metropolis(brightness, 0.1, keep_best=True))
    rewards = torch.stack([brightness(x) for x in states])
    expected = torch.stack([states[k][i] for i, k in enumerate(rewards.argmax(0).tolist())])
    assert torch.equal(best, expected)
    assert not torch.equal(best, last)


def test_infinite_temperature_is_plain_refinement_and_a_constant_reward_too(problem):
    plain = refine(problem, None)
    assert torch.equal(refine(problem, Metropolis(brightness, 1e300)), plain)
    assert torch.equal(refine(problem, Metropolis(lambda x: torch.zeros(len(x)))), plain)


def test_frozen_chains_and_chains_without_a_choice_propose_nothing(problem):
    rule = Metropolis(brightness, 0.1)
    refine(problem, rule, callback=lambda iteration, x: torch.arange(BATCH) < 5)
    assert rule.last.proposed.tolist() == [1] * 5 + [ITERS] * 7
    x, arguments = problem
    free = torch.ones(BATCH, arguments["model"].length if x.ndim == 2 else 16, dtype=torch.bool)
    out = refine(problem, rule, known=free)
    assert torch.equal(out, x)
    assert int(rule.last.proposed.sum()) == 0
    assert rule.last.reward_calls == ITERS + 1


def test_parts_of_a_run_equal_the_whole(problem):
    """Up to rounding, as without acceptance: here samples are float32 or tokens."""
    rule = Metropolis(brightness, 0.1)
    whole = refine(problem, rule)
    half = refine(problem, rule, iters=2)
    torch.testing.assert_close(refine((half, problem[1]), rule, iters=2, first_iteration=3), whole)


@pytest.mark.parametrize("drawn", [5, 60, 1024])
def test_numbers_drawn_ahead_are_those_of_each_iteration(monkeypatch, drawn):
    """However many iterations' numbers are drawn at once: here those of one, of five, and of 32."""
    x = generate_batch(BATCH, model=Lookup(), schedule=TokenSchedule(3))
    problem, rule = (x, {"model": Lookup(), "schedule": TokenSchedule(3)}), Metropolis(brightness, 0.1)
    whole = refine(problem, rule, iters=70, first_iteration=9)
    decisions = rule.last.accepted
    monkeypatch.setattr(acceptance, "DRAWN", drawn)
    assert torch.equal(refine(problem, rule, iters=70, first_iteration=9), whole)
    assert torch.equal(rule.last.accepted, decisions)
    part = refine(problem, rule, iters=33, first_iteration=9)
    assert torch.equal(refine((part, problem[1]), rule, iters=37, first_iteration=42), whole)


# --------------------------------------------------------------------------------------------------------------- laws


def proposals(oracle, size, at_once=False):
    """The law (81, 81) of a proposal given the state: `size` positions, chosen uniformly, are drawn anew.

    One at a time with exact conditionals, which is their joint law given the others; or at once, from marginals.
    """
    states, sets = oracle.states, list(itertools.combinations(range(oracle.length), size))
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    for chosen in sets:
        others = [i for i in range(oracle.length) if i not in chosen]
        alike = (states[:, None, others] == states[None, :, others]).all(-1).double()
        if at_once:
            masked = states.index_fill(1, torch.tensor(chosen), oracle.size)
            law = oracle.conditionals(masked)  # (81, 4, 3)
            share = torch.stack([law[:, i][:, states[:, i]] for i in chosen]).prod(0)
        else:
            share = oracle.law / (alike @ oracle.law)[:, None]
        matrix += alike * share / len(sets)
    return matrix


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_stationary_law_is_the_models_times_the_exponential_of_the_reward(size, temperature):
    oracle = Oracle()
    reward = reward_of(oracle.states)
    matrix = metropolis(proposals(oracle, size), reward, temperature)
    target = tilted(oracle.law, reward, temperature)
    torch.testing.assert_close(target @ matrix, target, rtol=0, atol=1e-12)
    if size > 1:
        torch.testing.assert_close(stationary(matrix), target, rtol=0, atol=1e-9)


def test_several_tokens_at_once_miss_that_law():
    oracle = Oracle()
    reward = reward_of(oracle.states)
    found = stationary(metropolis(proposals(oracle, 2, at_once=True), reward, 0.3))
    missed = distance(found, tilted(oracle.law, reward, 0.3))
    print(f"two tokens at once: total variation {missed:.3f}")
    assert 0.01 < missed < 0.2


@pytest.mark.parametrize("at_once", [False, True], ids=["one at a time", "at once"])
def test_samples_of_the_engine_have_the_law_of_the_matrix(at_once):
    oracle, temperature = Oracle(), 0.7
    reward = reward_of(oracle.states)
    x = oracle.draw(60_000)
    schedule = TokenSchedule(1) if at_once else TokenSchedule(order="random")
    rule = Metropolis(reward_of, temperature)
    refined = refine_batch(x, random_patches(0.5), 3, model=oracle, schedule=schedule, accept=rule, seed=3)
    matrix = metropolis(proposals(oracle, 2, at_once), reward, temperature)
    law = oracle.law @ torch.linalg.matrix_power(matrix, 3)
    assert abs(oracle.excess(refined, law)) < ALMOST_NEVER


def test_the_tilted_law_is_kept():
    oracle = Oracle()
    target = tilted(oracle.law, reward_of(oracle.states), 1.0)
    generator = torch.Generator().manual_seed(0)
    x = oracle.states[torch.multinomial(target, 60_000, replacement=True, generator=generator)]
    rule = Metropolis(reward_of, 1.0)
    schedule = TokenSchedule(order="random")
    refined = refine_batch(x, random_patches(0.5), 4, model=oracle, schedule=schedule, accept=rule, seed=4)
    assert 0.1 < float(rule.last.accepted.sum() / rule.last.proposed.sum()) < 0.97
    assert abs(oracle.excess(refined, target)) < ALMOST_NEVER


@pytest.mark.parametrize("policy", [random_patches(0.5), all_patches()], ids=["half", "all"])
def test_the_moments_of_a_gaussian_mixture_are_those_of_the_tilted_law(policy):
    """Reward b sum(x): a component's law N(m, s^2) becomes N(m + b s^2 / T, s^2), its weight grows by exp(4 m b / T).

    Chains that renoise all patches begin at the mixture itself; those that renoise half keep their component for long,
    and begin at the tilted law. The proposals take 60 steps for all patches at once and lose 2 % of the variance
    (`tests/sampling/test_few_steps.py`); tolerances are that and five standard errors.
    """
    count, slope = 4096, 0.25  # b / T
    weight = 1 / (1 + math.exp(-8 * MEAN * slope))  # of the positive component
    mean = slope * STD**2 + (2 * weight - 1) * MEAN
    variance = STD**2 + 4 * weight * (1 - weight) * MEAN**2
    x = draw(count)
    if policy != all_patches():
        positive = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(1)) < weight
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        x = torch.where(positive, MEAN, -MEAN) + slope * STD**2 + STD * noise
    rule = Metropolis(lambda x: 0.5 * x.flatten(1).sum(1), 2.0)
    x = refine_batch(x, policy, 6, model=ExactDenoiser(), schedule=Schedule(60, 1.0), accept=rule, seed=6)
    assert 0.3 < float(rule.last.accepted.sum() / rule.last.proposed.sum()) < 0.9
    error = ALMOST_NEVER * x.flatten(1).mean(1).std().item() / count**0.5
    assert abs(x.mean().item() - mean) < error + 0.02 * mean
    squares = (x - mean).square().flatten(1).mean(1)
    error = ALMOST_NEVER * squares.std().item() / count**0.5
    assert abs(squares.mean().item() - variance) < error + 0.02 * variance


@pytest.mark.parametrize("keep_best", [False, True])
def test_what_a_reward_returns_stays_the_users(problem, keep_best):
    """One that keeps it, one that returns its buffer, and one that returns a part of the samples."""
    seen, buffer = [], torch.empty(BATCH, dtype=torch.float64)

    def keeps(x):
        seen.append((x, x.double().flatten(1).mean(1)))
        return seen[-1][1]

    def reuses(x):
        return buffer.copy_(x.double().flatten(1).mean(1))

    expected = refine(problem, Metropolis(lambda x: x.double().flatten(1).mean(1), keep_best=keep_best))
    rule = Metropolis(keeps, keep_best=keep_best)
    assert torch.equal(refine(problem, rule), expected)
    assert all(torch.equal(reward, x.double().flatten(1).mean(1)) for x, reward in seen)
    assert rule.last.reward.data_ptr() not in [reward.data_ptr() for _, reward in seen]
    assert torch.equal(refine(problem, Metropolis(reuses, keep_best=keep_best)), expected)
    x, arguments = problem
    start = x.double() if x.is_floating_point() else x
    before = start.clone()
    refine((start, arguments), Metropolis(lambda x: x.flatten(1)[:, 3], keep_best=keep_best))
    assert torch.equal(start, before)
    one = Metropolis(lambda x: torch.zeros((), dtype=torch.float64).expand(len(x)))
    assert torch.equal(refine(problem, one), refine(problem, None))


# ---------------------------------------------------------------------------------------------------------- bad input


def broken(x):
    raise KeyError("no board")


def writing(x):
    x.zero_()
    return brightness(x)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (broken, RuntimeError, r"reward broken raised KeyError in the call before iteration 1: 'no board'"),
        (writing, ValueError, r"reward writing writes into its input `x`"),
        (
            lambda x: brightness(x)[:3],
            ValueError,
            r"must return real numbers of shape \(12,\), got \(3,\) of torch.float32",
        ),
        (lambda x: brightness(x)[:, None], ValueError, r"shape \(12,\), got \(12, 1\)"),
        (lambda x: 1.0, ValueError, r"shape \(12,\), got float in the call before iteration 1"),
        (
            lambda x: brightness(x).to("meta"),
            ValueError,
            r"shape \(12,\), got \(12,\) of torch.float32, meta torch.strided in",
        ),
        (lambda x: brightness(x).to_sparse(), ValueError, r"got \(12,\) of torch.float32, cpu torch.sparse_coo in"),
        (lambda x: brightness(x) + 1j, ValueError, r"real numbers of shape \(12,\), got \(12,\) of torch.complex64"),
        (
            lambda x: brightness(x) * math.nan,
            ValueError,
            r"must not return NaN, got NaN for 12 of 12 samples in the call before iteration 1",
        ),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(problem, reward, error, message):
    with pytest.raises(error, match=message):
        refine(problem, Metropolis(reward, 1.0))


def test_a_reward_that_writes_past_torch_does_not_reach_the_callers_samples(problem):
    """No version of a tensor tells of it."""
    x, kept = problem[0], problem[0].clone()
    refine(problem, Metropolis(lambda x: brightness(x.data.fill_(0.5)), 1.0))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metropolis(3.0), r"^reward must be a function of samples, got float"),
        (lambda: Metropolis(torch.nn.Flatten), r"^reward must be a function of samples, got the class Flatten"),
        (lambda: Metropolis(brightness, [1, 0.5]), r"got \[1, 0.5\]; a function of the iteration is a schedule"),
        (lambda: Metropolis(brightness, -1), r"^temperature must be a finite number >= 0, got -1"),
        (lambda: Metropolis(brightness, math.inf), r"^temperature must be a finite number >= 0, got inf"),
        (lambda: Metropolis(brightness, "hot"), r"^temperature must be a finite number >= 0, got 'hot'"),
        (lambda: Metropolis(brightness, keep_best=1), r"^keep_best must be a bool, got 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_temperature_that_goes_wrong_is_named(problem):
    def cooling(iteration):
        return 1.0 - iteration

    with pytest.raises(ValueError, match=r"^temperature cooling in iteration 2 must be a finite number >= 0, got -1.0"):
        refine(problem, Metropolis(brightness, cooling))


def test_a_reward_that_puts_the_model_into_training_mode_is_found(finished):
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.exact, self.dropout = ExactDenoiser(), torch.nn.Dropout(0.5)
            self.grid = self.exact.grid

        def forward(self, patches, levels, active=None):
            return self.exact(self.dropout(patches), levels, active)

    network = Dropping().eval()
    with pytest.raises(ValueError, match=r"its Dropout .dropout. is in training mode"):
        refine_batch(draw(2), POLICY, 2, model=network, accept=Metropolis(lambda x: network.train() and brightness(x)))


def test_what_is_no_rule_is_refused(problem):
    with pytest.raises(ValueError, match=r"^accept must be an ipr_fast.Metropolis, got brightness, make it with"):
        refine(problem, brightness)
    with pytest.raises(ValueError, match=r"^accept must be an ipr_fast.Metropolis, got the class Metropolis, make it"):
        refine(problem, Metropolis)
    with pytest.raises(ValueError, match=r"^accept must be an ipr_fast.Metropolis, got float"):
        refine(problem, 0.5)


def test_rewards_may_be_integers_bools_or_infinite(problem):
    x, _ = problem
    plain = refine(problem, Metropolis(lambda x: torch.where(brightness(x) > 0, 1.0, -math.inf)))
    assert plain.shape == x.shape
    for reward in (lambda x: (brightness(x) > 0).long(), lambda x: brightness(x) > 0):
        assert torch.equal(refine(problem, Metropolis(reward)), plain)


def test_the_rule_prints_itself():
    assert repr(Metropolis(brightness, 0.5)) == "Metropolis(brightness, 0.5)"
    assert repr(Metropolis(brightness, lambda i: 1.0 / i, keep_best=True)).endswith("<lambda>, keep_best=True)")
    assert ipr_fast.Metropolis is Metropolis
