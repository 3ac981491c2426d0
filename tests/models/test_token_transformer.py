"""TokenTransformer: partial attention, the cache and the table, and the engine that runs on them."""

import copy
import dataclasses

import pytest
import torch
from small_models import TINY_TOKENS, randomise

import ipr_fast
from ipr_fast import ActivePatches, TokenSchedule, generate_batch, random_patches, refine_batch
from ipr_fast.engine.graph_cache import drop_kept
from ipr_fast.models import TokenTransformer, TokenTransformerConfig, contract
from ipr_fast.models.files.checkpoints import load_model, model_info, save_model
from ipr_fast.models.token_denoiser import TokenDenoiser

MASK, LENGTH = TINY_TOKENS.mask_id, TINY_TOKENS.length
LEVELS = torch.tensor([0.0, *[1.0] * 15])  # as the engine passes them

SCHEDULES = {
    "one at a time": TokenSchedule(),
    "entropy": TokenSchedule(3, order="entropy", temperature=0.7),
    "remasking": TokenSchedule(5, "independent", remask="cap"),
}


@pytest.fixture(scope="module")
def token_model() -> TokenTransformer:
    return randomise(TokenTransformer(TINY_TOKENS), seed=0)


def make_case(generator):
    """Tokens (10, 16) of chains with none to all positions active, of which some are masked."""
    tokens = torch.randint(1, 6, (10, LENGTH), generator=generator)
    mask = torch.rand(10, LENGTH, generator=generator) < torch.rand(10, 1, generator=generator)
    mask[0], mask[1] = False, True
    masked = mask & (torch.rand(10, LENGTH, generator=generator) < 0.6)
    return tokens.masked_fill(masked, MASK), mask, ActivePatches.from_mask(mask, slots=LENGTH)


def assert_same_slots(ours, theirs, active):
    """Some thirty roundings of numbers about 1 in size."""
    occupied = active.occupied
    torch.testing.assert_close(ours.logits[occupied], theirs.logits[occupied], atol=1e-5, rtol=1e-5)


def test_it_keeps_the_protocol(token_model):
    assert isinstance(token_model, TokenDenoiser)
    assert contract.prepares(token_model)
    assert contract.tabulates(token_model)
    assert token_model.vocabulary == ipr_fast.Vocabulary(6, 0)
    assert token_model.length == 16


def test_the_logits_of_the_slots_are_those_of_all_positions_under_the_mask(token_model, generator):
    tokens, mask, active = make_case(generator)
    every = token_model.predict(tokens, mask).logits
    found = token_model(tokens, active)
    assert found.logits.shape == (10, LENGTH, 6)
    assert torch.equal(found.logits[active.occupied], every[mask])


def test_a_context_and_a_table_change_nothing(token_model, generator):
    table = token_model.tabulate(torch.zeros(16))
    assert token_model.tabulate(LEVELS, out=table) is table
    context = None
    for _ in range(3):  # the buffers serve one iteration after another
        tokens, mask, active = make_case(generator)
        for options in ({}, {"table": table}):
            if context is not None:
                context.keys_values.fill_(float("nan"))
            begun = tokens.masked_fill(mask, MASK)
            context = token_model.prepare(begun, active, out=context, **options)
            for values in (begun, tokens):  # steps reveal tokens, and the context stays
                found = token_model(values, active, context=context, **options)
                assert_same_slots(found, token_model(values, active), active)
    few = active[:4]
    found = token_model(tokens[:4], few, context=context.first(4), table=table)
    assert_same_slots(found, token_model(tokens[:4], few), few)


def test_where_all_is_active_no_context_is_computed(token_model, generator):
    tokens = torch.randint(0, 6, (10, LENGTH), generator=generator)
    active = ActivePatches.from_mask(torch.ones_like(tokens, dtype=torch.bool))
    context = token_model.prepare(tokens.fill_(MASK), dataclasses.replace(active, whole=True))
    assert not context.keys_values.any()
    assert_same_slots(token_model(tokens, active, context=context), token_model(tokens, active), active)


def test_logits_of_wanted_slots_alone(token_model, generator):
    config = dataclasses.replace(token_model.config, vocabulary_size=token_model.width + 5)
    model = randomise(TokenTransformer(config), seed=1)
    tokens, mask, active = make_case(generator)
    context = model.prepare(tokens.masked_fill(mask, MASK), active)
    every = model(tokens, active, context=context).logits
    wanted = torch.randint(0, LENGTH, (10, 3), generator=generator)
    found = model(tokens, dataclasses.replace(active, wanted=wanted), context=context).logits
    expected = every.gather(1, wanted[..., None].expand(-1, -1, every.shape[2]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_context_sees_itself_and_active_positions_see_everything(token_model, generator):
    tokens = torch.randint(1, 6, (10, LENGTH), generator=generator)
    is_active = torch.zeros(10, LENGTH, dtype=torch.bool)
    is_active[:, 5:9] = True
    base = token_model.predict(tokens, is_active).logits
    for position in range(LENGTH):
        changed = tokens.clone()
        changed[:, position] = changed[:, position] % 5 + 1
        moved = (token_model.predict(changed, is_active).logits - base).abs().amax(-1)
        assert (moved[:, 5:9] > 1e-6).all()
        if 5 <= position < 9:
            assert (moved[:, :5] == 0).all()
            assert (moved[:, 9:] == 0).all()
    every = torch.ones_like(is_active)
    assert not torch.allclose(token_model.predict(tokens, every).logits[:, 5:9], base[:, 5:9])  # the role matters
    torch.testing.assert_close(token_model(tokens).logits, token_model.predict(tokens, every).logits)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_weights_of_any_precision_run(token_model, generator, dtype, tolerance):
    tokens, mask, active = make_case(generator)
    other, exact = copy.deepcopy(token_model).to(dtype), token_model(tokens, active).logits[active.occupied]
    begun = tokens.masked_fill(mask, MASK)
    for context in (None, other.prepare(begun, active)):
        ours = other(tokens, active, context=context).logits[active.occupied].float()
        assert (ours - exact).abs().max() < tolerance


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_engine_equals_the_definition(token_model, generator, schedule):
    """In float64, whose roundings do not decide between tokens."""
    model = copy.deepcopy(token_model).double()
    known = torch.rand(9, LENGTH, generator=generator) < torch.linspace(-0.1, 1.2, 9)[:, None]
    values = torch.randint(1, 6, (9, LENGTH), generator=generator)
    results = []
    for options in ({"backend": "reference"}, {}, {"max_chains": 4}):
        drop_kept()
        common = {"model": model, "schedule": schedule, "known": known, "seed": 3, **options}
        x = generate_batch(9, known_values=values, **common)
        results.append((x, refine_batch(x, random_patches(0.4), 3, **common)))
    for found in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(found, results[0], strict=True))
    assert torch.equal(results[0][1][known], values[known])
    assert not torch.equal(*results[0])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_captured_steps_equal_the_definition(tape, token_model, schedule):
    """Captured without a look at data, and replayed for another seed and for other clues."""
    model, runs = copy.deepcopy(token_model).double(), []
    for backend in ("auto", "reference"):
        for seed in (1, 2):
            known = torch.arange(LENGTH) % 4 == seed
            common = {"model": model, "schedule": schedule, "seed": seed, "backend": backend}
            common["known"] = known.expand(7, -1)
            x = generate_batch(7, known_values=torch.full((7, LENGTH), 3), **common)
            runs.append(refine_batch(x, random_patches(0.4), 2, **common))
    assert tape.replayed
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])


def test_weights_that_change_between_calls_are_seen(token_model):
    """The table of an earlier call is filled anew."""
    model = copy.deepcopy(token_model)
    options = {"model": model, "schedule": TokenSchedule(4)}
    first = generate_batch(5, **options)
    model.role.weight += 1.0
    assert not torch.equal(generate_batch(5, **options), first)
    model.role.weight -= 1.0
    model.role.weight.copy_(token_model.role.weight)
    assert torch.equal(generate_batch(5, **options), first)


@pytest.mark.parametrize("mask_id", [0, 5, 6])
def test_a_saved_model_comes_back(tmp_path, mask_id):
    config = dataclasses.replace(TINY_TOKENS, mask_id=mask_id)
    model = randomise(TokenTransformer(config), seed=1)
    assert model.token_in.num_embeddings == max(6, mask_id + 1)
    save_model(model, tmp_path / "model.safetensors", note="for a test")
    again, info = load_model(tmp_path / "model.safetensors"), model_info(tmp_path / "model.safetensors")
    assert again.config == config
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    assert (info["architecture"], info["sample_shape"]) == ("TokenTransformer", (16,))
    assert info["metadata"]["note"] == "for a test"
    tokens = torch.full((2, LENGTH), mask_id)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"width": 33}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"box_size": 3}, "box_size"),
        ({"rows": 2, "columns": 3, "box_size": 2}, "box_size"),
        ({"rows": 0}, "rows"),
        ({"columns": 2.0}, "columns"),
        ({"rows": 1 << 10, "columns": 1 << 10}, "columns"),
        ({"vocabulary_size": 0}, "vocabulary_size"),
        ({"mask_id": 7}, "mask_id"),
        ({"vocabulary_size": 1}, "vocabulary_size"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(bad, named):
    with pytest.raises(ValueError, match=named):
        TokenTransformerConfig(**(TINY_TOKENS.to_dict() | bad))
