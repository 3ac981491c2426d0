"""Refinement of tokens: the engine against the definition, and both against laws that are known exactly."""

import math

import pytest
import torch
from small_token_models import Lookup, Oracle

import ipr_fast
from ipr_fast import all_patches, fixed_patches, generate_batch, random_patches, refine_batch
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule, Vocabulary

SCHEDULES = (
    TokenSchedule(),
    TokenSchedule(order="random"),
    TokenSchedule(4, order="entropy", temperature=0.7, top_p=0.8),
    TokenSchedule(4, order="margin", temperature=1.5, top_k=3),
    TokenSchedule(temperature=0),
    TokenSchedule(7, "independent"),
    TokenSchedule(5, remask="cap"),
    TokenSchedule(6, remask="conf", top_p=0.5, nucleus="inner"),
    TokenSchedule(20, order="margin", remask="loop"),
    TokenSchedule(6, "independent", remask="forward_backward"),
    TokenSchedule(6, "independent", remask="rescale"),
)
BATCH = 9
ALMOST_NEVER = 5.0  # standard deviations


@pytest.fixture
def clues():
    """Known positions (B, N), from none to all of a chain, and their tokens."""
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(BATCH, Lookup.length, generator=generator) < torch.linspace(-0.1, 1.2, BATCH)[:, None]
    return known, torch.randint(0, 2, (BATCH, Lookup.length), generator=generator)


def run(schedule, clues, policy=None, rows=slice(None), **options):
    """Generate chains and refine them; returns both."""
    known, values = (each[rows] for each in clues)
    ids = torch.arange(BATCH)[rows]
    common = {"model": Lookup(), "schedule": schedule, "seed": 7, "known": known, "chain_ids": ids, **options}
    x = generate_batch(len(ids), known_values=values, **common)
    return x, refine_batch(x, random_patches(0.4) if policy is None else policy, 4, **common)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.reveal}-{s.order}-{s.steps}")
def test_the_engine_equals_the_definition_however_chains_are_run(schedule, clues):
    expected = run(schedule, clues, backend="reference")
    for options in ({}, {"max_chains": 1}, {"max_chains": 4}):
        assert all(torch.equal(*pair) for pair in zip(run(schedule, clues, **options), expected, strict=True))
    rows = torch.tensor([7, 0, 3])
    part = run(schedule, clues, rows=rows)
    assert all(torch.equal(found, whole[rows]) for found, whole in zip(part, expected, strict=True))
    known, values = clues
    for tokens in expected:
        assert torch.equal(tokens[known], values[known])
        assert not torch.isin(tokens[~known], torch.tensor([2, Lookup.size])).any()


class Rated(Lookup):
    """Also rates each token, by the token and the one before it; a masked position's rating is NaN."""

    def __init__(self):
        super().__init__()
        self.ratings = 3 * torch.rand(self.size + 1, self.size + 1, generator=torch.Generator().manual_seed(2))

    def __call__(self, tokens, active):
        quality = self.ratings[tokens, tokens.roll(1, 1)].masked_fill(tokens == self.size, torch.nan)
        return super().__call__(tokens, active)._replace(quality=active.gather(quality))


@pytest.mark.parametrize("how", [("count", "confidence"), ("count", "random"), ("independent", "confidence")])
def test_the_engine_masks_by_a_models_ratings_as_the_definition_does(how, clues):
    schedule = TokenSchedule(8, *how, remask="quality")
    expected = run(schedule, clues, model=Rated(), backend="reference")
    for options in ({}, {"max_chains": 1}, {"max_chains": 4}):
        found = run(schedule, clues, model=Rated(), **options)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    found, other = (
        generate_batch(64, model=Rated(), schedule=TokenSchedule(8, *how, remask=name)) for name in ("quality", "conf")
    )
    assert (found != other).any(1).sum() > 10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_model_without_ratings_cannot_be_masked_by_them(clues, backend):
    with pytest.raises(ValueError, match=r'^model must return the quality of tokens for remask="quality", got None'):
        run(TokenSchedule(8, remask="quality"), clues, backend=backend)


def test_a_token_is_masked_again_by_the_softmax_of_its_rating():
    """In the second of four steps of one position each: of two that show, which is masked again."""
    seen = []

    class Watched(Oracle):
        def __call__(self, tokens, active):
            seen.append(tokens.clone())
            return super().__call__(tokens, active)._replace(quality=active.gather(tokens.float()))

    schedule = TokenSchedule(4, order="random", remask="quality")
    generate_batch(40_000, model=Watched(), schedule=schedule, seed=5, max_chains=40_000)
    before, after = seen[2:4]
    shown = (before != 3).sum(1) == 2
    before, after = before[shown], after[shown]
    weight = (-before.double()).exp().masked_fill(before == 3, 0)
    expected = float(schedule.tables(4).sigma[4, 2]) * weight / weight.sum(1, keepdim=True)
    for token in range(3):
        at = before == token
        again = (after[at] == 3).double()
        error = (expected[at] * (1 - expected[at])).sum().sqrt()
        assert abs(again.sum() - expected[at].sum()) < ALMOST_NEVER * error


class Narrow(Lookup):
    """Returns the logits of the wanted slots alone; `narrow` counts the calls in which these are not all."""

    def __init__(self):
        super().__init__()
        self.narrow = 0

    def __call__(self, tokens, active):
        self.narrow += active.wanted is not None
        return super().__call__(tokens, active.narrowed())


class Spoiled(Lookup):
    """Says NaN of all positions that hold a token."""

    def __call__(self, tokens, active):
        prediction = super().__call__(tokens, active)
        shows = active.gather(tokens) != self.size
        return TokenPrediction(prediction.logits.masked_fill(shows[..., None], torch.nan))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.reveal}-{s.order}-{s.steps}")
@pytest.mark.parametrize("make", [Narrow, Spoiled])
def test_logits_of_positions_that_hold_a_token_do_not_matter(schedule, make, clues):
    model = make()
    found = run(schedule, clues, model=model)
    assert all(torch.equal(*pair) for pair in zip(found, run(schedule, clues), strict=True))
    assert make is Spoiled or model.narrow


@pytest.mark.parametrize(
    "policy",
    [all_patches(), fixed_patches([0, 5]), lambda x, iteration: torch.arange(11).expand_as(x) % 3 == iteration % 3],
    ids=["all", "fixed", "function"],
)
def test_other_policies_choose_positions_too(policy, clues):
    expected = run(TokenSchedule(3), clues, policy, backend="reference")
    assert all(torch.equal(*pair) for pair in zip(run(TokenSchedule(3), clues, policy), expected, strict=True))


def test_a_callback_sees_tokens_and_freezes_chains(clues):
    x, _ = run(TokenSchedule(), clues)
    seen = []

    def callback(iteration, tokens):
        seen.append(tokens)
        return torch.arange(BATCH) < 4

    out = refine_batch(x, all_patches(), 3, model=Lookup(), callback=callback)
    assert torch.equal(out[:4], seen[0][:4])
    assert not torch.equal(out[4:], seen[0][4:])
    assert out.dtype == torch.int64


def test_25_iterations_and_25_more_equal_50(clues):
    x, _ = run(TokenSchedule(2), clues)
    options = {"model": Lookup(), "schedule": TokenSchedule(2)}
    half = refine_batch(x, random_patches(0.3), 5, **options)
    whole = refine_batch(x, random_patches(0.3), 10, **options)
    assert torch.equal(refine_batch(half, random_patches(0.3), 5, first_iteration=6, **options), whole)


# -------------------------------------------------------------------------------------------------------- exact laws


@pytest.mark.parametrize("order", ["random", "margin", "entropy"])
def test_one_token_at_a_time_samples_the_models_law(order):
    oracle = Oracle()
    x = generate_batch(60_000, model=oracle, schedule=TokenSchedule(order=order), seed=1)
    assert abs(oracle.excess(x)) < ALMOST_NEVER


def test_revealing_the_most_probable_draw_first_biases_the_law():
    """Which position comes first then depends on what was drawn: common tokens are revealed more often."""
    oracle = Oracle()
    x = generate_batch(60_000, model=oracle, schedule=TokenSchedule(order="confidence"), seed=1)
    assert oracle.excess(x) > 100


@pytest.mark.parametrize("policy", [random_patches(0.5), random_patches(0.25), all_patches()])
def test_refinement_with_exact_conditionals_keeps_the_law(policy):
    oracle = Oracle()
    x = oracle.draw(60_000)
    refined = refine_batch(x, policy, 3, model=oracle, schedule=TokenSchedule(order="random"), seed=2)
    assert not torch.equal(refined, x)
    assert abs(oracle.excess(refined)) < ALMOST_NEVER


def test_all_tokens_at_once_have_the_product_of_the_marginals():
    oracle = Oracle()
    marginals = oracle.conditionals(torch.full((1, 4), 3))[0]
    product = torch.einsum("a,b,c,d->abcd", *marginals).flatten()
    x = generate_batch(60_000, model=oracle, schedule=TokenSchedule(1), seed=3)
    assert abs(oracle.excess(x, product)) < ALMOST_NEVER
    assert oracle.excess(x) > 100  # which is not the model's law


def test_temperature_and_top_k_change_the_law_of_a_token():
    oracle = Oracle()
    marginals = oracle.conditionals(torch.full((1, 4), 3))[0].log()
    allowed = marginals >= marginals.sort(-1).values[:, 1:2]
    law = (marginals / 1.7).masked_fill(~allowed, -torch.inf).softmax(-1)
    x = generate_batch(20_000, model=oracle, schedule=TokenSchedule(1, temperature=1.7, top_k=2), seed=4)
    for position in range(4):
        found = torch.bincount(x[:, position], minlength=3) / len(x)
        torch.testing.assert_close(found.double(), law[position], rtol=0, atol=4 * 0.5 / len(x) ** 0.5)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x.float(), r"^x must be int64 tokens \(B, 11\) to fit the model, got \(9, 11\) of torch.float32"),
        (lambda x: x[:, :3], r"^x must be int64 tokens \(B, 11\) to fit the model, got \(9, 3\) of torch.int64"),
        (lambda x: x - 5, r"^x must have tokens in 0\.\.5, got -5\.\.0"),
        (lambda x: x + 2, r"^x must have tokens in 0\.\.5, got "),
        (lambda x: x.clone().fill_(6), r"^x must have no masked positions, got mask_id 6 at 99"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change, problem, clues):
    x, _ = run(TokenSchedule(), clues)
    x[0, 0], x[0, 1] = 5, 0
    with pytest.raises(ValueError, match=problem):
        refine_batch(change(x), random_patches(0.4), model=Lookup())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"schedule": ipr_fast.Schedule(3)}, "schedule must be an ipr_fast.TokenSchedule for a model of tokens"),
        ({"temperature": 0.5}, "temperature must be left at 1.0 for a model of tokens, got 0.5; TokenSchedule has"),
        ({"stochasticity": 0.1}, "stochasticity must be left at 0.5"),
        ({"noise": "fixed"}, "noise must be left at 'random'"),
        ({"known": torch.zeros(9, 3, dtype=torch.bool)}, "known must have shape"),
    ],
)
def test_arguments_that_mean_nothing_for_tokens_are_refused(options, problem, clues):
    x, _ = run(TokenSchedule(), clues)
    with pytest.raises(ValueError, match=f"^{problem}"):
        refine_batch(x, random_patches(0.4), model=Lookup(), **options)


def test_a_mask_among_known_tokens_is_refused(clues):
    known, values = clues
    values[8, 0] = Lookup.size
    with pytest.raises(ValueError, match=r"^known_values must have no masked positions, got mask_id 6 at 1"):
        generate_batch(BATCH, model=Lookup(), known=known, known_values=values)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x.float(), r"int64 tokens \(B, 11\) to fit the model, got \(9, 11\) of torch.float32"),
        (lambda x: x.int(), r"int64 tokens \(B, 11\) to fit the model, got \(9, 11\) of torch.int32"),
        (lambda x: x[:, :3], r"int64 tokens \(B, 11\) to fit the model, got \(9, 3\) of torch.int64"),
        (lambda x: x.tolist(), r"int64 tokens \(B, 11\) to fit the model, got list"),
        (lambda x: x + 10, r"tokens in 0\.\.5, got 10\.\."),
        (lambda x: x - 10, r"tokens in 0\.\.5, got -10\.\."),
    ],
)
def test_known_tokens_that_do_not_fit_are_refused(change, problem, clues):
    known, values = clues
    with pytest.raises(ValueError, match=f"^known_values must (be|have) {problem}"):
        generate_batch(BATCH, model=Lookup(), known=known, known_values=change(values))


def test_the_values_of_unknown_positions_do_not_matter(clues):
    known, values = clues
    x = generate_batch(BATCH, model=Lookup(), known=known, known_values=values)
    values = values.masked_fill(~known, 99)
    assert torch.equal(generate_batch(BATCH, model=Lookup(), known=known, known_values=values), x)


class Returning(Lookup):
    """Returns what a function makes of the logits."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __call__(self, tokens, active):
        return self.make(super().__call__(tokens, active).logits)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda x: TokenPrediction(x[..., :-1]), r"must return floating-point logits of shape \({}, 11, 6\), got "),
        (lambda x: TokenPrediction(x[:, :1]), r"must return floating-point logits of shape \({}, 11, 6\), got "),
        (lambda x: TokenPrediction(x.long()), r"must return floating-point logits .* of torch.int64"),
        (lambda x: TokenPrediction(x.numpy()), r"must return floating-point logits .* got ndarray"),
        (lambda x: TokenPrediction(x, x), r"must return floating-point quality of shape \({}, 11\), got "),
        (lambda x: TokenPrediction(x.to("meta")), ": its logits must be on cpu, got meta"),
        (lambda x: TokenPrediction(x.mT.contiguous().mT), "must return logits with contiguous rows, got strides"),
        (lambda x: x, "must return a TokenPrediction, got Tensor"),
        (lambda x: None, "must return a TokenPrediction, got NoneType"),
    ],
)
def test_predictions_that_break_the_protocol_are_named(make, problem, backend):
    rows = 1 if backend == "reference" else 2
    with pytest.raises(ValueError, match=f"^model ?{problem.format(rows)}"):
        generate_batch(2, model=Returning(make), backend=backend)


def test_models_that_break_the_protocol_are_named():
    class Writing(Lookup):
        def __call__(self, tokens, active):
            tokens.clamp_(max=3)
            return super().__call__(tokens, active)

    class Short(Lookup):
        length = 0

    class Sized(Lookup):
        def __init__(self):
            super().__init__()
            self.vocabulary = 6

    for model, problem in (
        (Writing(), "writes into its input `tokens`"),
        (Short(), "`length` >= 1, got Short of length 0"),
        (Sized(), "^model: the vocabulary of a model of tokens must be an ipr_fast.Vocabulary, got int"),
        (Lookup, "^model must be an instance, got the class Lookup"),
    ):
        with pytest.raises(ValueError, match=problem):
            generate_batch(2, model=model)


def test_logits_without_a_maximum_leave_a_mask_and_a_warning():
    class Broken(Lookup):
        def __call__(self, tokens, active):
            prediction = super().__call__(tokens, active)
            prediction.logits[0, 4] = torch.nan
            return prediction

    with pytest.warns(RuntimeWarning, match="1 of 3 samples have masked positions"):
        x = generate_batch(3, model=Broken(), schedule=TokenSchedule(order="random"))
    assert (x == Lookup.size).sum(1).tolist() == [1, 0, 0]


def test_a_mask_id_within_the_vocabulary_is_never_sampled():
    class Inside(Lookup):
        def __init__(self):
            super().__init__()
            self.vocabulary = Vocabulary(6, 3)

    x = generate_batch(50, model=Inside())
    assert not (x == 3).any()
    assert sorted(x.unique().tolist()) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("temperature", [-1.0, 1e-7, 1e7, math.nan, True, "1"])
def test_a_temperature_out_of_range_is_named_where_it_is_given(temperature):
    """Beyond 1e6 ids that must not be drawn would have a chance: they are masked by a large finite logit."""
    with pytest.raises(ValueError, match=r"^temperature must be 0 or in \[1e-06, 1e\+06\], got "):
        TokenSchedule(temperature=temperature)


def test_at_the_largest_temperature_all_ids_that_may_be_drawn_are():
    model = Lookup()
    x = generate_batch(200, model=model, schedule=TokenSchedule(temperature=1e6))
    assert set(x.flatten().tolist()) == set(range(model.vocabulary.size)) - set(model.vocabulary.forbidden)
