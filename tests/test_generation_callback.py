"""The callback of generate_batch: finished steps of all chains, frozen chains, and no change of what is generated."""

import pytest
import torch
from conditioned_models import Labelled
from small_token_models import Lookup

from ipr_fast import Schedule, TokenSchedule, generate_batch, load_model

SCHEDULE = Schedule(3, 0.5)


def patches_of(model, finished, ragged_known):
    return {"model": model, "known": ragged_known, "known_values": finished, "schedule": SCHEDULE, "seed": 3}


def test_a_callback_sees_each_step_of_every_chain(backend, model, finished, ragged_known):
    options = patches_of(model, finished, ragged_known)
    expected, seen = generate_batch(12, **options), {}
    found = generate_batch(12, callback=seen.__setitem__, max_chains=5, backend=backend, **options)
    assert (found - expected).abs().max() < 2e-5  # products of other sizes round otherwise
    totals = [SCHEDULE.steps(n) for n in (~ragged_known).sum(1).tolist()]
    assert list(seen) == list(range(max(totals)))
    assert torch.equal(seen[max(totals) - 1], found)
    changed = torch.stack([(seen[s] != seen[s - 1]).flatten(1).any(1) for s in range(1, len(seen))])
    for chain, total in enumerate(totals):
        assert changed[: max(0, total - 1), chain].all()
        assert not changed[max(0, total - 1) :, chain].any()  # it has finished
    given = ragged_known[..., None] & torch.ones(16, dtype=torch.bool)
    for x in seen.values():
        assert torch.equal(model.grid.to_patches(x)[given], model.grid.to_patches(finished)[given])
    assert seen[0].flatten(1).std(1)[0] > 0.5  # patches that wait are noise


@pytest.mark.parametrize("schedule", [TokenSchedule(4), TokenSchedule(6, remask="conf")], ids=["count", "remasked"])
def test_a_callback_sees_masked_and_revealed_tokens(backend, schedule):
    seen, options = {}, {"model": Lookup(), "schedule": schedule}
    found = generate_batch(6, callback=seen.__setitem__, max_chains=4, backend=backend, **options)
    assert torch.equal(found, generate_batch(6, **options))
    masked = torch.stack([(x == Lookup.size).sum(1) for x in seen.values()])
    assert (masked[0] > 0).all()
    assert (masked[-1] == 0).all()
    assert list(seen) == list(range(schedule.num_steps(11)))


def test_a_frozen_chain_stays_as_it_is(backend, model, finished, ragged_known):
    options, seen = patches_of(model, finished, ragged_known), {}
    even = torch.arange(12) % 2 == 0

    def callback(step, x):
        seen[step] = x
        return even if step == 4 else None

    found = generate_batch(12, callback=callback, backend=backend, **options)
    expected = generate_batch(12, **options)
    assert torch.equal(found[even], seen[4][even])
    assert (found - expected)[~even].abs().max() < 2e-5
    steps = []
    generate_batch(12, callback=lambda step, x: steps.append(step) or torch.ones(12, dtype=torch.bool), **options)
    assert steps == [0]


def test_chains_keep_their_conditions(backend):
    labels = torch.arange(6)
    options = {"model": Labelled(), "condition": labels, "schedule": SCHEDULE}
    found = generate_batch(6, callback=lambda step, x: None, max_chains=4, backend=backend, **options)
    assert (found - generate_batch(6, **options)).abs().max() < 2e-5


def test_bad_callbacks_are_named(model):
    options = {"model": model, "schedule": SCHEDULE}
    with pytest.raises(ValueError, match="callback must be callable, got int"):
        generate_batch(2, callback=3, **options)
    with pytest.raises(
        ValueError, match=r"callback .*<lambda> must return None or a bool tensor of shape \(2,\), got int"
    ):
        generate_batch(2, callback=lambda step, x: 1, **options)

    with pytest.raises(ValueError, match=r"must return None or a bool tensor .* got .* on meta"):
        generate_batch(2, callback=lambda step, x: torch.ones(2, dtype=torch.bool, device="meta"), **options)

    def fail(step, x):
        if step:
            raise KeyError("no")

    with pytest.raises(RuntimeError, match=r"callback .*fail raised KeyError in step 1: 'no'"):
        generate_batch(2, callback=fail, **options)
    assert generate_batch(0, callback=lambda step, x: None, **options).shape == (0, 1, 16, 16)


def test_progress_counts_steps(model, capsys):
    generate_batch(3, model=model, schedule=SCHEDULE, callback=lambda step, x: None, progress=True)
    assert f"{SCHEDULE.steps(16)}/{SCHEDULE.steps(16)}" in capsys.readouterr().err


def test_tokens_that_a_callback_left_masked_are_no_fault_of_the_model(recwarn):
    model = load_model("token-sudoku-9x9")
    first = torch.tensor([True, False])
    x = generate_batch(2, model=model, schedule=TokenSchedule(4), callback=lambda step, x: first)
    assert (x == model.vocabulary.mask_id).any(1).tolist() == [True, False]
    assert not recwarn.list
