"""Generation toward a reward: IterRef and its rivals in both engines, and their laws, enumerated."""

import math
import re
from pathlib import Path

import pytest
import torch
from small_models import randomise
from small_token_models import Lookup, Oracle
from token_laws import Partial, acceptance, distance, metropolis, reward_of, stationary, tilted

import ipr_fast
from ipr_fast import IterRef, TokenSchedule, generate_batch
from ipr_fast.models import TokenTransformer, TokenTransformerConfig
from ipr_fast.sampling.guidance.best_of import BestOfN
from ipr_fast.sampling.guidance.steering import Steering
from ipr_fast.sampling.guidance.svdd import SVDD

BATCH, CHAINS = 9, 20_000
ALMOST_NEVER = 5.0  # standard deviations
ONE_BY_ONE = TokenSchedule(order="random")


def mean(x):
    return x.double().mean(1)


METHODS = [
    IterRef(mean, 0.1),
    IterRef(mean, 0.1, levels=(0.5,), moves=5, noise_steps=2, candidates=3),
    IterRef(mean, levels=(0.0,), moves=3, noise_steps=100, candidates=3),
    BestOfN(mean, 3),
    Steering(mean, 0.1, 3),
    Steering(mean, 0.1, 3, returns="draw"),
    SVDD(mean, candidates=3),
    SVDD(mean, 0.1, candidates=2),
]


def named(method):
    return f"{type(method).__name__}-{method.width}-{getattr(method, 'temperature', 0)}"


@pytest.fixture
def clues():
    """Known positions (B, N), from none to all of a chain, and their tokens."""
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(BATCH, Lookup.length, generator=generator) < torch.linspace(-0.1, 1.2, BATCH)[:, None]
    return known, torch.randint(0, 2, (BATCH, Lookup.length), generator=generator)


def run(method, clues, rows=slice(None), **options):
    known, values = (each[rows] for each in clues)
    arguments = {"model": Lookup(), "schedule": TokenSchedule(4), "seed": 7, "known": known, "known_values": values}
    return generate_batch(len(known), chain_ids=torch.arange(BATCH)[rows], guidance=method, **{**arguments, **options})


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_engine_takes_the_references_decisions_however_chains_are_run(method, clues):
    expected, last = run(method, clues, backend="reference"), method.last
    for options in ({}, {"max_chains": 1}, {"max_chains": 4}):
        assert torch.equal(run(method, clues, **options), expected)
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(run(method, clues, rows), expected[rows])
    known, values = clues
    assert torch.equal(expected[known], values[known])
    assert not torch.isin(expected[~known], torch.tensor([2, Lookup.size])).any()
    cost = getattr(last, "cost", last)
    assert cost.model_calls[known.all(1)].tolist() == [0] * int(known.all(1).sum())
    plain = run(None, clues)
    assert mean(expected).mean() > mean(plain).mean()


@pytest.mark.parametrize("method", METHODS[1:], ids=named)
def test_graphs_and_a_model_with_context_take_them_too(method, tape):
    """Captured on a tape; known tokens are the model's context."""
    config = TokenTransformerConfig(vocabulary_size=5, mask_id=0, rows=4, columns=4, width=16, depth=1, num_heads=1)
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(BATCH, 16, generator=generator) < torch.linspace(-0.1, 1.2, BATCH)[:, None]
    values = torch.randint(1, 5, (BATCH, 16), generator=generator)
    options = {"model": randomise(TokenTransformer(config), seed=0), "schedule": TokenSchedule(5)}
    runs = [
        generate_batch(BATCH, known=known, known_values=values, guidance=method, backend=backend, **options)
        for backend in ("auto", "torch", "reference")
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert tape.replayed


def test_one_row_of_a_chain_is_the_chain_without_guidance(clues):
    plain = run(None, clues)
    assert torch.equal(run(BestOfN(mean, 1), clues), plain)
    seen = []

    def reward(x):
        seen.append(x)
        return mean(x)

    run(BestOfN(reward, 3), clues)
    assert torch.equal(seen[0][:BATCH], plain)
    assert not torch.equal(seen[0][BATCH : 2 * BATCH], plain)


def test_calls_are_counted_apart():
    """T = 8 steps; a state is completed by one call, a finished one by none."""
    options = {"model": Lookup(), "schedule": TokenSchedule(8)}
    refine = IterRef(mean, 0.1, levels=(0.5, 0.0), moves=3, noise_steps=2)
    expected = [
        (refine, 8 + (1 + 3 * (2 + 1)) + 3 * 2, 2 * (1 + 3)),
        (BestOfN(mean, 5), 5 * 8, 5),
        (Steering(mean, 1.0, 3, (0.75, 0.25)), 3 * (8 + 2), 3 * 3),
        (SVDD(mean, candidates=3), 3 * (8 + 7), 3 * 8),
    ]
    for method, model_calls, reward_calls in expected:
        generate_batch(2, guidance=method, **options)
        cost = getattr(method.last, "cost", method.last)
        assert cost.model_calls.tolist() == [model_calls] * 2
        assert cost.reward_calls.tolist() == [reward_calls] * 2
    assert refine.last.proposed.tolist() == [6, 6]


@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_every_chain_makes_the_same_number_of_moves(candidates):
    """However many candidates are drawn at once, and whatever is accepted."""
    refine = IterRef(mean, 0.05, moves=7, candidates=candidates)
    generate_batch(50, model=Lookup(), guidance=refine)
    assert refine.last.proposed.tolist() == [4 * 7] * 50
    assert 0 < int(refine.last.accepted.sum()) < int(refine.last.proposed.sum())


# --------------------------------------------------------------------------------------------------------------- laws


class Level:
    """The states of a level that `seen` revealed tokens are at, each with a completion: pairs (P,).

    law (P,): of the model; reward (P,): of the completion. proposal(back, reveal): the law (P, P) of a proposal.
    """

    def __init__(self, partial, seen):
        self.partial = partial
        places = (partial.completion > 0) & (partial.seen == seen)[:, None]
        self.state, self.whole = places.nonzero(as_tuple=True)
        self.share = partial.completion[self.state, self.whole]
        self.reward = reward_of(partial.oracle.states)[self.whole]
        law = partial.start() @ torch.linalg.matrix_power(partial.reveal(1), seen)
        self.law = law[self.state] * self.share

    def proposal(self, *steps):
        matrix = torch.linalg.multi_dot([*steps]) if len(steps) > 1 else steps[0]
        return matrix[self.state][:, self.state] * self.share

    def states(self, law):
        """The law (256,) of the states alone."""
        return torch.zeros(256, dtype=torch.float64).index_add_(0, self.state, law)


@pytest.fixture(scope="module")
def partial():
    return Partial(Oracle())


@pytest.mark.parametrize(("seen", "steps"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moves_keep_the_models_law_times_the_exponential_of_the_reward(partial, seen, steps, temperature):
    level = Level(partial, seen)
    proposal = level.proposal(partial.back(steps), *[partial.reveal(1)] * steps)
    torch.testing.assert_close(proposal.sum(1), torch.ones(len(proposal)).double(), rtol=0, atol=1e-12)
    matrix, target = metropolis(proposal, level.reward, temperature), tilted(level.law, level.reward, temperature)
    torch.testing.assert_close(target @ matrix, target, rtol=0, atol=1e-12)
    torch.testing.assert_close(stationary(matrix), target, rtol=0, atol=1e-9)
    if seen == 4:
        law = partial.finished(level.states(target))
        expected = tilted(partial.oracle.law, reward_of(partial.oracle.states), temperature)
        torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


def test_several_tokens_at_once_miss_that_law(partial):
    level = Level(partial, 4)
    matrix = metropolis(level.proposal(partial.back(2), partial.reveal(2)), level.reward, 0.3)
    missed = distance(stationary(matrix), tilted(level.law, level.reward, 0.3))
    print(f"two tokens at once: total variation {missed:.3f}")
    assert 0.01 < missed < 0.2


def tried_in_order(proposal, accepted, again):
    """The law of a round of two candidates from one state.

    again: what happens to the second one after the first was accepted: "tried" from the new state, though it was drawn
    from the old one; "dropped", and the round ends there.
    """
    count, eye = len(proposal), torch.eye(len(proposal), dtype=torch.float64)
    matrix = torch.zeros_like(proposal)
    for x in range(count):
        q, a = proposal[x], accepted[x]
        stay = (q * (1 - a)).sum()
        second = q * a + eye[x] * stay
        matrix[x] = stay * second
        if again == "dropped":
            matrix[x] += q * a
            continue
        first = q * a  # the state that the second candidate is tried from
        moved = first[:, None] * q[None, :] * accepted
        matrix[x] += moved.sum(0) + first - moved.sum(1)
    return matrix


def test_candidates_used_wrongly_bias(partial):
    """What an 'optimisation' of the moves would do: none of these keeps the law that separate moves keep."""
    level = Level(partial, 4)
    proposal, temperature = level.proposal(partial.back(2), partial.reveal(1), partial.reveal(1)), 0.2
    accepted = acceptance(level.reward, temperature)
    target = tilted(level.law, level.reward, temperature)
    one = metropolis(proposal, level.reward, temperature)
    twice = proposal * (1 - (1 - accepted) ** 2)
    twice.diagonal().zero_()
    wrong = {
        "trying a rejected candidate again": twice + torch.diag(1 - twice.sum(1)),
        "trying an old candidate from the new state": tried_in_order(proposal, accepted, "tried"),
        "stopping at the first acceptance": tried_in_order(proposal, accepted, "dropped"),
    }
    assert distance(stationary(one), target) < 1e-9
    for name, matrix in wrong.items():
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)).double(), rtol=0, atol=1e-12)
        missed = distance(stationary(matrix), target)
        print(f"{name}: total variation {missed:.3f}")
        assert missed > 0.02, name


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(
    ("levels", "moves", "noise_steps"), [((0.5,), 3, 1), ((0.5, 0.0), 3, 2), ((0.25, 0.0), 4, 1)], ids=str
)
def test_samples_have_the_law_of_the_matrices(partial, levels, moves, noise_steps, candidates):
    temperature = 0.5
    law, seen, reveal = partial.start(), 0, partial.reveal(1)
    for at in levels:
        then = round(4 * (1 - at))
        law, seen, level = law @ torch.linalg.matrix_power(reveal, then - seen), then, Level(partial, then)
        proposal = level.proposal(partial.back(noise_steps), *[reveal] * noise_steps)
        matrix = torch.linalg.matrix_power(metropolis(proposal, level.reward, temperature), moves)
        law = level.states((law[level.state] * level.share) @ matrix)
    law = partial.finished(law @ torch.linalg.matrix_power(reveal, 4 - seen))
    refine = IterRef(reward_of, temperature, levels, moves, noise_steps, candidates)
    x = generate_batch(CHAINS, model=partial.oracle, schedule=ONE_BY_ONE, guidance=refine, seed=candidates)
    assert abs(partial.oracle.excess(x, law)) < ALMOST_NEVER
    assert partial.oracle.excess(x) > 30


def test_the_best_of_n_has_the_law_of_a_maximum(partial):
    oracle, n = partial.oracle, 3
    reward = reward_of(oracle.states)
    at_most = (oracle.law * (reward[:, None] >= reward)).sum(1)
    below = (oracle.law * (reward[:, None] > reward)).sum(1)
    law = oracle.law * (at_most**n - below**n) / (at_most - below)
    assert float(law.sum()) == pytest.approx(1)
    x = generate_batch(CHAINS, model=oracle, schedule=ONE_BY_ONE, guidance=BestOfN(reward_of, n), seed=1)
    assert abs(oracle.excess(x, law)) < ALMOST_NEVER


def test_svdd_chooses_among_successors_by_their_weights(partial):
    """Two candidates (y, c), (y', c'): the first is chosen with probability w / (w + w'), w = exp(r(c) / T)."""
    oracle, temperature, reveal = partial.oracle, 0.3, partial.reveal(1)
    weight = (reward_of(oracle.states) / temperature).exp()
    matrix = torch.zeros(256, 256, dtype=torch.float64)
    for x in range(256):
        y, c = ((reveal[x][:, None] * partial.completion) > 0).nonzero(as_tuple=True)
        q = reveal[x, y] * partial.completion[y, c]
        chosen = 2 * q * (weight[c][:, None] / (weight[c][:, None] + weight[c]) @ q)
        matrix[x].index_add_(0, y, chosen)
    law = partial.finished(partial.start() @ torch.linalg.matrix_power(matrix, 4))
    assert float(law.sum()) == pytest.approx(1)
    guidance = SVDD(reward_of, temperature, candidates=2)
    x = generate_batch(CHAINS, model=oracle, schedule=ONE_BY_ONE, guidance=guidance, seed=2)
    assert abs(oracle.excess(x, law)) < ALMOST_NEVER
    assert oracle.excess(x) > 30


def test_steering_resamples_particles_by_their_gain(partial):
    """Two particles, resampled once with one token masked, of which three finished states can come."""
    oracle, temperature = partial.oracle, 0.3
    level, rewards = Level(partial, 3), reward_of(oracle.states)
    end = partial.completion[level.state].topk(3)  # also the law of the last step
    finish, whole = end.values, end.indices
    final = ((rewards[whole] - level.reward[:, None]) / temperature).exp()
    first = (level.reward / temperature).exp()
    share = first[:, None] / (first[:, None] + first)  # of a in the pair (a, b)
    pair = level.law[:, None] * level.law
    slots = pair * share * (1 - share)
    slots = slots + slots.T + torch.diag((pair * share**2).sum(1) + (pair * (1 - share) ** 2).sum(0))
    taken = (final[:, None, :, None] / (final[:, None, :, None] + final[None, :, None, :]) * finish[:, None]).sum(-1)
    law = torch.zeros(81, dtype=torch.float64)
    law.index_add_(0, whole.flatten(), (2 * finish * (slots[..., None] * taken).sum(1)).flatten())
    assert float(law.sum()) == pytest.approx(1)
    guidance = Steering(reward_of, temperature, particles=2, levels=(0.25,), returns="draw")
    x = generate_batch(CHAINS, model=oracle, schedule=ONE_BY_ONE, guidance=guidance, seed=3)
    assert abs(oracle.excess(x, law)) < ALMOST_NEVER
    assert oracle.excess(x) > 30


def test_particles_that_all_lose_at_a_level_are_kept_without_a_weight(partial):
    """So each chain ends in one of two independent samples, drawn by their last weights."""
    oracle, temperature, calls = partial.oracle, 0.3, []

    def reward(x):
        calls.append(len(x))
        return torch.full((len(x),), -math.inf) if len(calls) <= 2 else reward_of(x)

    weight = (reward_of(oracle.states) / temperature).exp()
    law = 2 * oracle.law * (oracle.law * weight[:, None] / (weight[:, None] + weight)).sum(1)
    guidance = Steering(reward, temperature, particles=2, levels=(0.75, 0.25), returns="draw")
    x = generate_batch(CHAINS, model=oracle, schedule=ONE_BY_ONE, guidance=guidance, seed=4)
    assert len(calls) == 3
    assert abs(oracle.excess(x, law)) < ALMOST_NEVER
    assert oracle.excess(x) > 30


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IterRef(3.0), r"^reward must be a function of samples, got float"),
        (lambda: IterRef(mean, -1), r"^temperature must be a finite number >= 0, got -1"),
        (lambda: IterRef(mean, levels=()), r"^levels must be distinct and at least one, got \(\)"),
        (lambda: IterRef(mean, levels=(1,)), r"^levels must be numbers in \[0, 1\), got \(1,\); at level 1 nothing"),
        (lambda: IterRef(mean, levels=(0.5, 1.5)), r"^levels must be numbers in \[0, 1\), got \(0.5, 1.5\)$"),
        (lambda: IterRef(mean, levels=(0.5, 0.5)), r"^levels must be distinct and at least one"),
        (lambda: IterRef(mean, levels="10"), r"^levels must be numbers in \[0, 1\), got \('1', '0'\)$"),
        (lambda: IterRef(mean, moves=0), r"^moves must be an int >= 1, got 0"),
        (lambda: IterRef(mean, noise_steps=0), r"^noise_steps must be an int >= 1, got 0"),
        (lambda: IterRef(mean, moves=2, candidates=3), r"^candidates must be an int in 1..2, got 3"),
        (lambda: BestOfN(mean, 0), r"^n must be an int >= 1, got 0"),
        (lambda: Steering(mean, 0), r"^temperature must be a finite number > 0, got 0"),
        (lambda: Steering(mean, 1.0, returns="all"), r"^returns must be best or draw, got 'all'"),
        (lambda: SVDD(mean, candidates=0), r"^candidates must be an int >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guidance_of_the_users_without_a_width_is_named():
    class Own:
        def stages(self, steps):
            return 1

        def generate(self, generation):
            return generation.samples(generation.start)[0]

    with pytest.raises(ValueError, match="guidance: Own must have `width` and `reward`, see Guidance"):
        generate_batch(1, model=Lookup(), guidance=Own())


@pytest.mark.parametrize(
    ("reward", "returned", "message"),
    [
        (
            mean,
            lambda samples: samples,
            r"Own.generate must return samples \(3, 11\) of torch.int64, got \(1, 3, 11\) of",
        ),
        (mean, lambda samples: samples[0].float(), r"must return samples .* got \(3, 11\) of torch.float32"),
        (mean, lambda samples: None, r"must return samples .* got NoneType"),
        (None, lambda samples: samples[0], r"^guidance.reward must be callable, got NoneType"),
    ],
)
def test_what_a_guidance_of_the_users_returns_is_checked(reward, returned, message):
    class Own:
        width = 1

        def stages(self, steps):
            return 1

        def generate(self, generation):
            return returned(generation.samples(generation.start))

    Own.reward = staticmethod(reward) if reward else None
    with pytest.raises(ValueError, match=message):
        generate_batch(3, model=Lookup(), guidance=Own())


def test_a_guidance_of_more_rows_than_its_width_is_named():
    class Wide(BestOfN):
        width = 2

    with pytest.raises(ValueError, match="guidance: it has 2 rows a chain, its width, got states of 4"):
        generate_batch(3, model=Lookup(), guidance=Wide(mean, 4))


def test_an_error_of_a_reward_names_the_step():
    def fails(x):
        raise KeyError("no")

    guidance = IterRef(fails, 0.1, levels=(0.5,), moves=1)
    with pytest.raises(RuntimeError, match="reward fails raised KeyError in step 6: 'no'"):
        generate_batch(2, model=Lookup(), schedule=ONE_BY_ONE, guidance=guidance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": mean}, r"^guidance must be an object such as ipr_fast.IterRef\(reward, ...\), got mean"),
        (
            {"guidance": IterRef},
            r"^guidance must be an object such as ipr_fast.IterRef\(reward, ...\), got the class IterRef",
        ),
        ({"schedule": TokenSchedule(remask="cap")}, r'^guidance: BestOfN needs a schedule that reveals by "count"'),
        ({"schedule": TokenSchedule(reveal="independent")}, r"^guidance: BestOfN needs a schedule"),
        ({"guidance": BestOfN(mean, 2**40)}, r"^guidance.width must be an int in 1..4294967296, got 1099511627776"),
        ({"guidance": BestOfN(mean, 2**32)}, r"^guidance, 4294967296 rows a chain: 4294967296 samples take at least"),
        ({"chain_ids": torch.tensor([1 << 30])}, r"^chain_ids must be below 1073741824 for 4 rows a chain"),
    ],
)
def test_what_it_cannot_be_applied_to_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(1, **{"model": Lookup(), "guidance": BestOfN(mean, 4), **options})


@pytest.mark.parametrize("method", [IterRef, BestOfN, Steering, SVDD])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: mean(x) * math.nan, r"must not return NaN"),
        (lambda x: mean(x)[:1], r"must return real numbers of shape"),
        (lambda x: mean(x.zero_()), r"writes into its input `x`"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(method, reward, message):
    guidance = method(reward, 2) if method is BestOfN else method(reward, 1.0)
    with pytest.raises(ValueError, match=message):
        generate_batch(3, model=Lookup(), guidance=guidance)


def test_a_reward_is_not_asked_about_no_samples():
    """At this level no chain has a step to take back; of known tokens there is nothing to reward."""

    def reward(x):
        return mean(x) + x.max()

    guidance = IterRef(reward, 0.1, levels=(0.75, 0.0), moves=2)
    generate_batch(3, model=Lookup(), schedule=TokenSchedule(1), guidance=guidance)
    assert guidance.last.cost.reward_calls.tolist() == [3] * 3
    known, values = torch.ones(2, Lookup.length, dtype=torch.bool), torch.ones(2, Lookup.length, dtype=torch.int64)
    for method in (guidance, SVDD(reward)):
        x = generate_batch(2, model=Lookup(), known=known, known_values=values, guidance=method)
        assert torch.equal(x, values)


def test_rewards_may_be_infinite():
    def reward(x):
        return torch.where(x[:, 3] == 1, 0.0, -math.inf)

    for method in (IterRef(reward, 0.1), BestOfN(reward, 4), Steering(reward, 0.1), SVDD(reward), SVDD(reward, 0.1)):
        x = generate_batch(30, model=Lookup(), guidance=method)
        assert (reward(x) == 0).sum() > (reward(generate_batch(30, model=Lookup())) == 0).sum()
    assert generate_batch(0, model=Lookup(), guidance=ipr_fast.IterRef(reward)).shape == (0, 11)


def test_the_readme_runs_and_names_its_files():
    folder = Path(__file__).parents[2] / "ipr_fast/sampling/guidance"
    readme, namespace = (folder / "README.md").read_text(), {}
    block, _ = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)  # tests/test_readme.py runs both
    exec(compile(block, "guidance/README.md", "exec"), namespace)
    assert namespace["guidance"].last.proposed.tolist() == [24] * 4
    named = set(re.findall(r"(?<![\w/])`(\w+\.py)`", readme))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}
