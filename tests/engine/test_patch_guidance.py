"""Generation of patches toward a reward: the methods in both engines, where a move goes back to, and their laws."""

import math

import pytest
import torch
from gaussian_mixture import MEAN, STD, ExactDenoiser

from ipr_fast import (
    IterRef,
    Metropolis,
    PatchGrid,
    Prediction,
    Schedule,
    generate_batch,
    random_patches,
    refine,
    refine_batch,
)
from ipr_fast.engine.progress import Pace
from ipr_fast.sampling.guidance.best_of import BestOfN
from ipr_fast.sampling.guidance.generation import row_ids
from ipr_fast.sampling.guidance.patch_generation import PatchGeneration
from ipr_fast.sampling.guidance.steering import Steering
from ipr_fast.sampling.guidance.svdd import SVDD
from ipr_fast.sampling.schedule import Sampling

BATCH = 7
SCHEDULES = [Schedule(2, 0.0), Schedule(3, 0.5), Schedule(3, 1.0)]


def brightness(x):
    return x.double().flatten(1).mean(1)


METHODS = [
    IterRef(brightness, 0.02, moves=3),
    IterRef(brightness, 0.02, levels=(0.5, 0.0), moves=5, noise_steps=5, candidates=3),
    BestOfN(brightness, 3),
    Steering(brightness, 0.02, 3),
    Steering(brightness, 0.02, 3, returns="draw"),
    SVDD(brightness, candidates=3, every=2),
    SVDD(brightness, 0.02, candidates=2),
]


def named(method):
    return f"{type(method).__name__}-{method.width}-{getattr(method, 'temperature', 0)}"


@pytest.fixture
def clues():
    """Known patches (B, N), from none to all of a chain, and their values."""
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(BATCH, 16, generator=generator) < torch.linspace(-0.1, 1.2, BATCH)[:, None]
    return known, torch.rand(BATCH, 1, 16, 16, generator=generator) - 0.5


def run(method, model, clues, rows=slice(None), **options):
    known, values = (each[rows] for each in clues)
    arguments = {"model": model, "schedule": SCHEDULES[0], "seed": 7, "known": known, "known_values": values}
    return generate_batch(len(known), chain_ids=torch.arange(BATCH)[rows], guidance=method, **{**arguments, **options})


CASES = [(method, SCHEDULES[0]) for method in METHODS] + [
    (method, schedule) for method in (METHODS[1], METHODS[4]) for schedule in SCHEDULES[1:]
]


@pytest.mark.parametrize(("method", "schedule"), CASES, ids=[f"{named(each)} {str(at)[9:-1]}" for each, at in CASES])
def test_the_engine_takes_the_references_decisions_however_chains_are_run(method, schedule, model, clues):
    expected, last = run(method, model, clues, backend="reference", schedule=schedule), method.last
    for options in ({}, {"max_chains": 4}):
        torch.testing.assert_close(run(method, model, clues, schedule=schedule, **options), expected)
        for found, counted in zip(method.last, last, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, counted, strict=True))
    rows = torch.tensor([5, 0, 3])
    torch.testing.assert_close(run(method, model, clues, rows, schedule=schedule), expected[rows])
    known, values = clues
    patches, given = (model.grid.to_patches(each) for each in (expected, values))
    assert torch.equal(patches[known], given[known])
    assert brightness(expected)[:-1].mean() > brightness(run(None, model, clues, schedule=schedule))[:-1].mean()


@pytest.mark.parametrize("method", METHODS[1:], ids=named)
def test_graphs_take_them_too(method, tape, model, clues):
    """Captured on a tape; known patches are the model's context."""
    runs = [run(method, model, clues, backend=backend) for backend in ("auto", "torch")]
    torch.testing.assert_close(*runs)  # lanes are rounded up, and a product of more rows rounds differently
    assert tape.replayed


def test_one_row_of_a_chain_is_the_chain_without_guidance(model, clues):
    assert torch.equal(run(BestOfN(brightness, 1), model, clues), run(None, model, clues))


def test_the_best_of_n_is_the_best_of_n_generations(model):
    """Those of the chains whose ids the rows have."""
    options = {"model": model, "schedule": SCHEDULES[1]}
    found = generate_batch(5, guidance=BestOfN(brightness, 3), **options)
    ids = row_ids(torch.arange(5), 3).view(3, 5)
    each = torch.stack([generate_batch(5, chain_ids=row, **options) for row in ids])
    best = torch.stack([brightness(x) for x in each]).argmax(0)
    torch.testing.assert_close(found, each[best, torch.arange(5)])
    assert len(best.unique()) > 1


def test_calls_are_counted_apart(model):
    """T = 48 steps of 16 patches; a state is completed by one call, a finished one by none."""
    options = {"model": model, "schedule": Schedule(3)}
    refine = IterRef(brightness, 0.1, levels=(0.5, 0.0), moves=3, noise_steps=4)  # rounded up to two patches
    expected = [
        (refine, 48 + (1 + 3 * (6 + 1)) + 3 * 6, 2 * (1 + 3)),
        (BestOfN(brightness, 5), 5 * 48, 5),
        (Steering(brightness, 1.0, 3, (0.75, 0.25)), 3 * (48 + 2), 3 * 3),
        (SVDD(brightness, candidates=3, every=3), 3 * (48 + 15), 3 * 16),
    ]
    for method, model_calls, reward_calls in expected:
        generate_batch(2, guidance=method, **options)
        cost = getattr(method.last, "cost", method.last)
        assert cost.model_calls.tolist() == [model_calls] * 2
        assert cost.reward_calls.tolist() == [reward_calls] * 2
    assert refine.last.proposed.tolist() == [6, 6]


# -------------------------------------------------------------------------------------------- where a move goes back to


class NoEngine:
    """Stands for the engine of a generation that takes no steps."""

    values = torch.zeros(0)


def generation(schedule, free):
    return PatchGeneration(
        torch.zeros(*free.shape, 1),
        Sampling(schedule),
        engine=NoEngine(),
        free=free,
        ids=torch.arange(len(free)),
        reward=brightness,
        to_samples=None,
        step_bar=None,
    )


@pytest.mark.parametrize(
    ("schedule", "done", "steps", "expected"),
    [
        (Schedule(3), 12, 1, 9),  # a whole patch
        (Schedule(3), 12, 4, 6),  # two
        (Schedule(3), 6, 3, 3),
        (Schedule(3), 7, 1, 6),  # the third patch is on its way
        (Schedule(3), 8, 3, 3),
        (Schedule(3), 12, 100, 0),
        (Schedule(3), 0, 1, 0),
        (Schedule(10, 0.8), 16, 1, 0),  # no patch is finished at 6, when the last one starts
        (Schedule(4, 0.5), 10, 1, 6),  # the last one starts at 6, when the first two are finished
        (Schedule(4, 0.5), 10, 5, 4),
        (Schedule(4, 0.5), 9, 1, 6),
        (Schedule(4, 0.5), 7, 1, 4),  # those that started at 4 and 6 are on their way
        (Schedule(4, 1.0), 4, 1, 0),
    ],
)
def test_a_move_goes_back_to_the_start_of_a_patch(schedule, done, steps, expected):
    """Of four patches."""
    made = generation(schedule, torch.ones(1, 4, dtype=torch.bool))
    assert made.before(torch.tensor([done]), steps).tolist() == [expected]


def test_a_move_keeps_random_ones_of_the_finished_patches():
    """At step 7 of 15 the third patch of five is on its way; going back to 3 keeps one of the two finished."""
    free = torch.ones(4000, 6, dtype=torch.bool)
    free[:, 2] = False
    made = generation(Schedule(3), free)
    level = torch.tensor([0.0, 2 / 3, 1.0, 0.0, 1.0]).expand(1, 4000, 5)
    start = torch.tensor([3, 6, -1, 0, -1], dtype=torch.int32).expand(1, 4000, 5)
    states = made.start._replace(slots=(level, start))
    back = made.before(torch.full((4000,), 7), 2)
    assert back.unique().tolist() == [3]
    level, start = made.step_back(states, back, 5).slots
    assert level[0].sum(1).unique().tolist() == [4.0]
    assert torch.equal(start, torch.where(level > 0, -1, 0).int())
    kept = (level[0] == 0).sum(0)
    assert kept[[1, 2, 4]].tolist() == [0, 0, 0]
    assert abs(int(kept[0]) - 2000) < 5 * math.sqrt(1000)


# --------------------------------------------------------------------------------------------------------------- laws

SLOPE = 0.25  # of the reward sum(x), divided by the temperature


def moments(x):
    return x.double().flatten(1).mean(), x.double().flatten(1).var(0).mean()


@pytest.mark.parametrize("candidates", [1, 3])
def test_finished_samples_of_a_gaussian_mixture_have_the_moments_of_the_tilted_law(candidates):
    """A component's law N(m, s^2) becomes N(m + b s^2 / T, s^2), its weight grows by exp(4 m b / T).

    A patch takes 60 steps, which lose 2 % of the variance (`tests/sampling/test_few_steps.py`); tolerances are that and
    five standard errors. A move regenerates all patches, so that chains change their component.
    """
    count, steps = 2048 // candidates, 60
    weight = 1 / (1 + math.exp(-8 * MEAN * SLOPE))
    mean = SLOPE * STD**2 + (2 * weight - 1) * MEAN
    variance = STD**2 + 4 * weight * (1 - weight) * MEAN**2
    refine = IterRef(lambda x: SLOPE * x.flatten(1).sum(1), 1.0, (0.0,), 8, 4 * steps, candidates)
    x = generate_batch(count, model=ExactDenoiser(), schedule=Schedule(steps), guidance=refine, seed=candidates)
    found, spread = moments(x)
    assert abs(found - mean) < 0.02 * mean + 5 * math.sqrt(variance / count)
    assert abs(spread - variance) < 0.04 * variance + 5 * variance * math.sqrt(2 / count)
    assert 0.3 < float(refine.last.accepted.sum() / refine.last.proposed.sum()) < 0.9


def test_states_with_patches_that_wait_are_tilted_by_the_reward_of_their_completion():
    """Two of four patches are finished; the completion gives the others their mean given these, m (P(+) - P(-)).

    So their law is p(a, b) exp((a + b + 2 E[x | a, b]) b / T), here on a grid, and the others follow from the model.
    """
    count, steps = 2048, 60
    at = torch.linspace(-7, 7, 701, dtype=torch.float64)
    a, b = at[:, None], at
    parts = torch.stack([torch.exp(-((a - m) ** 2 + (b - m) ** 2) / (2 * STD**2)) for m in (MEAN, -MEAN)])
    sign = (parts[0] - parts[1]) / parts.sum(0)  # P(+) - P(-)
    law = parts.sum(0) * (SLOPE * (a + b + 2 * MEAN * sign)).exp()
    law /= law.sum()
    mean = ((a + b) / 4 + MEAN * sign / 2).mul(law).sum().item()
    refine = IterRef(lambda x: SLOPE * x.flatten(1).sum(1), 1.0, (0.5,), 8, 2 * steps)
    x = generate_batch(count, model=ExactDenoiser(), schedule=Schedule(steps), guidance=refine, seed=2)
    assert abs(moments(x)[0] - mean) < 0.02 * mean + 5 * math.sqrt(2 / count)
    plain = generate_batch(count, model=ExactDenoiser(), schedule=Schedule(steps), seed=2)
    assert mean > 0.5 > moments(plain)[0] + 5 * math.sqrt(2 / count)


def test_moves_at_level_0_are_those_of_metropolis():
    """The same law as `accept=Metropolis` with all patches renoised; other random numbers."""
    count, steps = 2048, 40
    reward, options = (lambda x: SLOPE * x.flatten(1).sum(1)), {"model": ExactDenoiser(), "schedule": Schedule(steps)}
    refined = generate_batch(count, guidance=IterRef(reward, 1.0, (0.0,), 3, steps), **options)
    x = generate_batch(count, seed=1, **options)
    accepted = refine_batch(x, random_patches(0.25), 3, accept=Metropolis(reward, 1.0), seed=1, **options)
    (a, spread), (b, _) = moments(refined), moments(accepted)
    assert abs(a - b) < 5 * math.sqrt(2 * spread / count)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: brightness(x) * math.nan, r"must not return NaN"),
        (lambda x: x.mean(), r"must return real numbers of shape"),
        (lambda x: brightness(x.zero_()), r"writes into its input `x`"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(reward, message, model):
    for guidance in (IterRef(reward), BestOfN(reward, 2), Steering(reward, 1.0), SVDD(reward)):
        with pytest.raises(ValueError, match=message):
            generate_batch(2, model=model, guidance=guidance)


def test_a_reward_that_raises_is_named(model):
    def broken(x):
        raise KeyError("digits")

    with pytest.raises(RuntimeError, match="reward broken"):
        generate_batch(2, model=model, guidance=IterRef(broken))


@pytest.mark.parametrize("method", [*METHODS, IterRef(brightness, moves=4, levels=(0.5,), noise_steps=100)], ids=named)
def test_the_progress_bar_ends_full(method, model, clues, monkeypatch):
    bars = []

    class Noted(Pace):
        def __exit__(self, *error):
            bars.append((self._bar.n, self.total))
            super().__exit__(*error)

    monkeypatch.setattr(refine, "Pace", Noted)
    run(method, model, clues, progress=True)
    (bar,) = bars
    assert bar[0] == pytest.approx(bar[1]), method


def test_an_empty_batch_is_returned_at_once(model):
    assert generate_batch(0, model=model, guidance=IterRef(brightness)).shape == (0, 1, 16, 16)


def test_samples_that_are_not_finite_are_told():
    class Broken:
        grid = PatchGrid(1, 2, 2, 1)

        def __call__(self, patches, levels, active=None):
            slots = patches if active is None else active.gather(patches)
            return Prediction(slots * math.inf)

    with pytest.warns(RuntimeWarning, match="have NaN or inf"):
        generate_batch(2, model=Broken(), guidance=BestOfN(lambda x: torch.zeros(len(x)), 2))
