import math

import numpy as np
import pytest
import torch
from small_models import randomise

from ipr_fast import (
    PatchGrid,
    Schedule,
    TokenSchedule,
    all_patches,
    fixed_patches,
    random_patches,
    refine_batch,
    sweep_patches,
)
from ipr_fast.models import TokenTransformer, TokenTransformerConfig
from ipr_fast.sampling import policies

GRID = PatchGrid(1, 16, 16, 4)
CPU = torch.device("cpu")


def choose(policy, free, iteration=1, seed=0):
    policy = policy.bind(GRID, len(free), CPU)
    ids = torch.arange(len(free))
    return policy.choose(free, seed=seed, iteration=torch.tensor(iteration), chain_ids=ids), policy.sizes(free)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.29, 0.5, 1.0])
def test_random_patches_are_as_many_as_the_paper_says_and_free(ratio, ragged_known):
    free = ~ragged_known
    mask, sizes = choose(random_patches(ratio), free)
    assert not (mask & ~free).any()
    expected = [max(1, math.floor(ratio * n)) if n else 0 for n in free.sum(1).tolist()]
    assert mask.sum(1).tolist() == expected == sizes.tolist()


def test_random_patches_change_with_iteration_and_seed_only():
    free = torch.ones(64, 16, dtype=torch.bool)
    first = choose(random_patches(), free)[0]
    assert torch.equal(first, choose(random_patches(), free)[0])
    assert not torch.equal(first, choose(random_patches(), free, iteration=2)[0])
    assert not torch.equal(first, choose(random_patches(), free, seed=1)[0])


def test_fixed_random_patches_are_chosen_once_for_each_chain():
    free = torch.ones(64, 16, dtype=torch.bool)
    policy = random_patches(0.25, fixed=True)
    first = choose(policy, free)[0]
    assert (first.sum(1) == 4).all()
    assert torch.equal(first, choose(policy, free, iteration=2)[0])
    assert not torch.equal(first, choose(policy, free, seed=1)[0])
    assert len(first.unique(dim=0)) > 32
    assert not torch.equal(first, choose(random_patches(), free)[0])
    with pytest.raises(ValueError, match="fixed must be a bool, got 1"):
        random_patches(0.25, fixed=1)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 1.0])
def test_a_sweep_takes_every_free_patch_once(ratio, ragged_known):
    free = ~ragged_known
    count = free.sum(1)
    size = torch.tensor([policies.num_chosen(ratio, n) for n in count.tolist()])
    blocks = (-(-count // size.clamp_min(1))).clamp_min(1)
    seen = torch.zeros(2, *free.shape, dtype=torch.long)  # in the first two sweeps of each chain
    for iteration in range(1, 2 * int(blocks.max()) + 1):
        mask, sizes = choose(sweep_patches(ratio), free, iteration)
        assert torch.equal(sizes, size)
        sweep, block = (iteration - 1) // blocks, (iteration - 1) % blocks
        left = (count - block * size).clamp(max=size)
        assert torch.equal(mask.sum(1), left)
        for number in (0, 1):
            seen[number] += mask & (sweep == number)[:, None]
    assert torch.equal(seen[0], free.long())
    assert torch.equal(seen[1], free.long())


def test_sweeps_have_orders_of_their_own():
    free = torch.ones(64, 16, dtype=torch.bool)
    first, later = (choose(sweep_patches(), free, iteration)[0] for iteration in (1, 5))
    assert len(first.unique(dim=0)) > 32
    assert not torch.equal(first, later)
    assert not torch.equal(first, choose(sweep_patches(), free, seed=1)[0])
    share = torch.stack([choose(sweep_patches(), free, seed=seed)[0] for seed in range(50)]).float().mean((0, 1))
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 3200)


def test_a_swept_run_may_be_continued(model, finished, ragged_known):
    options = {"model": model, "known": ragged_known, "schedule": Schedule(2, 0.5)}
    whole = refine_batch(finished, sweep_patches(0.3), 5, **options)
    half = refine_batch(finished, sweep_patches(0.3), 2, **options)
    assert torch.equal(refine_batch(half, sweep_patches(0.3), 3, first_iteration=3, **options), whole)
    for other in ({"max_chains": 5}, {"backend": "reference"}):  # products of other sizes round otherwise
        expected = refine_batch(finished, sweep_patches(0.3), 5, **options, **other)
        assert (whole - expected).abs().max() < 2e-5


def test_all_patches_are_the_free_ones(ragged_known):
    mask, sizes = choose(all_patches(), ~ragged_known)
    assert torch.equal(mask, ~ragged_known)
    assert torch.equal(sizes, (~ragged_known).sum(1))


FORMS = ["ids", "ids tensor", "ids array", "mask", "mask list", "mask array", "plane", "batch", "batch plane"]


@pytest.mark.parametrize("form", FORMS)
def test_fixed_patches_take_every_form(form, ragged_known):
    wanted = torch.zeros(16, dtype=torch.bool)
    wanted[[2, 3, 15]] = True
    argument = {
        "ids": [2, 3, 15],
        "ids tensor": torch.tensor([15, 2, 3]),
        "ids array": np.array([2, 3, 15]),
        "mask": wanted,
        "mask list": wanted.tolist(),
        "mask array": wanted.numpy(),
        "plane": wanted.reshape(4, 4),
        "batch": wanted.expand(12, 16),
        "batch plane": wanted.expand(12, 16).reshape(12, 4, 4),
    }[form]
    mask, sizes = choose(fixed_patches(argument), ~ragged_known)
    assert torch.equal(mask, wanted & ~ragged_known)
    assert torch.equal(sizes, mask.sum(1))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_a_ratio_out_of_range_is_refused(ratio):
    for factory in (random_patches, sweep_patches):
        with pytest.raises(ValueError, match=r"ratio must be a number in \(0, 1\]"):
            factory(ratio)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ([16], "patch ids must lie in 0..15"),
        ([-1], "patch ids must lie in 0..15"),
        (torch.zeros(15, dtype=torch.bool), "got \\(15,\\)"),
        (torch.zeros(3, 16, dtype=torch.bool), "got \\(3, 16\\)"),
    ],
)
def test_fixed_patches_that_do_not_fit_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        fixed_patches(argument).bind(GRID, 12, CPU)


@pytest.mark.parametrize(
    "argument", [torch.zeros(16), [0.9, 3.7], 3, None, "abc", torch.zeros(2, 2, dtype=torch.int64)]
)
def test_fixed_patches_of_other_things_are_refused(argument):
    with pytest.raises(ValueError, match="bool mask or patch ids"):
        fixed_patches(argument)


def test_no_fixed_patches_are_legal(ragged_known):
    assert not choose(fixed_patches([]), ~ragged_known)[0].any()


def test_fixed_patches_do_not_follow_later_changes_of_the_mask(model, finished):
    mask = torch.zeros(16, dtype=torch.bool)
    mask[0] = True
    options = {"model": model, "schedule": Schedule(2, 0.5)}
    expected = refine_batch(finished, fixed_patches(mask.clone()), 2, **options)

    def change(iteration, x):
        mask.fill_(True)

    found = refine_batch(finished, fixed_patches(mask), 2, callback=change, **options)
    assert torch.equal(found, expected)


def test_a_subclass_of_fixed_patches_makes_its_own_choice(model, finished):
    class Moving(policies.FixedPatches):
        def choose(self, free, *, iteration, **more):
            return free & self.mask.roll(int(iteration), 1)

    refined = refine_batch(finished, Moving(torch.tensor([0])), 3, model=model, schedule=Schedule(2, 0.5))
    changed = (model.grid.to_patches(refined) != model.grid.to_patches(finished)).any(-1)
    assert changed.any(0).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_a_mask_of_numbers_is_not_taken_for_patch_ids(model, finished, kind):
    with pytest.raises(ValueError, match=r"patch ids must differ, got .* a mask must be bool"):
        refine_batch(finished, fixed_patches((torch.arange(16) < 2).to(kind)), 1, model=model)


class OddPatches(policies.MaskPolicy):
    """A policy that says "at most all" and chooses every second patch."""

    def sizes(self, free):
        return free.sum(1)

    def choose(self, free, **_):
        return free & (torch.arange(free.shape[1]) % 2 == 1)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_policy_may_choose_fewer_patches_than_all_that_it_allowed_for(model, finished, tokens):
    """The others are context, which the model has to prepare."""
    options = {"model": model, "schedule": Schedule(2, 0.5)}
    if tokens:
        config = TokenTransformerConfig(vocabulary_size=5, mask_id=0, columns=16, width=32, depth=2, num_heads=2)
        options = {"model": randomise(TokenTransformer(config), seed=0), "schedule": TokenSchedule(4)}
        finished = torch.randint(1, 5, (12, 16), generator=torch.Generator().manual_seed(0))
    found, expected = (
        refine_batch(finished, OddPatches(), 2, backend=name, **options).double() for name in ("torch", "reference")
    )
    assert (found - expected).abs().max() < 2e-5
