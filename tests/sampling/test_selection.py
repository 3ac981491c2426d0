"""Mask policies of users: breaches of their contract are named, in the engine, its graphs and the reference."""

import pytest
import torch

from ipr_fast import MaskPolicy, PatchGrid, Schedule, all_patches, refine_batch
from ipr_fast.sampling.policies import RandomPatches

GRID = PatchGrid(1, 16, 16, 4)


class Policy(MaskPolicy):
    """Chooses the first patches, as many as `size`."""

    size = 2

    def sizes(self, free):
        return torch.full((len(free),), self.size)

    def choose(self, free, *, seed, iteration, chain_ids):
        return (torch.arange(16) < self.size).expand(len(free), -1)


def test_a_policy_that_chooses_more_than_its_sizes_is_named(run, model):
    class Greedy(Policy):
        def choose(self, free, **more):
            return (torch.arange(16) < 5).expand(len(free), -1)

    with pytest.raises(ValueError, match=r"mask policy .*Greedy.*`choose` returned up to 3 patches more.*`sizes`"):
        run(model, Greedy())
    run(model, Policy())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["free", "iteration", "chain_ids"])
def test_a_policy_that_writes_into_its_inputs_is_named(run, model, name, inference):
    class Rude(Policy):
        def choose(self, free, **more):
            {"free": free, **more}[name].zero_()
            return super().choose(free, **more)

    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match=rf"mask policy .*Rude writes into its input `{name}`"),
    ):
        run(model, Rude(), chain_ids=torch.arange(12) + 1)


def test_sizes_that_write_are_named(run, model):
    class Rude(Policy):
        def sizes(self, free):
            free.zero_()
            return super().sizes(free)

    with pytest.raises(ValueError, match=r"mask policy .*Rude writes into its input `free`"):
        run(model, Rude())


def test_what_a_policy_raises_before_any_work_is_a_value_error(run, model):
    class Broken(Policy):
        def sizes(self, free):
            return {}["x"]

    with pytest.raises(ValueError, match=r"mask policy .*Broken: sizes raised KeyError: 'x'"):
        run(model, Broken())

    class Unbound(Policy):
        def bind(self, grid, batch, device):
            self.grid = grid

    with pytest.raises(ValueError, match=r"mask policy .*Unbound: bind must return a MaskPolicy, got NoneType"):
        run(model, Unbound())


def test_a_subclass_of_random_patches_makes_its_own_choice(run, model, finished):
    class FirstPatches(RandomPatches):
        def choose(self, free, **more):
            return (torch.arange(16) < 2).expand(len(free), -1)

    refined = run(model, FirstPatches(0.25))
    changed = (GRID.to_patches(refined) != GRID.to_patches(finished)).any(-1)
    assert changed[:, :2].all()
    assert not changed[:, 2:].any()


class Wrong(MaskPolicy):
    """A user's policy with mistakes."""

    def __init__(self, sizes=None, mask=None):
        self._sizes, self._mask = sizes, mask

    def sizes(self, free):
        return free.sum(1) if self._sizes is None else self._sizes(free)

    def choose(self, free, *, seed, iteration, chain_ids):
        return free if self._mask is None else self._mask(free)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Wrong(sizes=lambda free: free.sum(1)[:3]),
            r"Wrong: sizes must be an int64 tensor .*, got \(3,\)",
        ),
        (Wrong(sizes=lambda free: free.sum(1).float()), "sizes must be an int64 tensor"),
        (Wrong(sizes=lambda free: 4), "sizes must be an int64 tensor .* got int"),
        (Wrong(mask=lambda free: free.float()), "mask policy Wrong must be of dtype torch.bool"),
        (Wrong(mask=lambda free: free[:3]), "mask policy Wrong must have shape"),
        (Wrong(mask=lambda free: None), "mask policy Wrong must be a torch.Tensor"),
    ],
)
def test_a_users_policys_results_are_checked(model, finished, policy, message):
    with pytest.raises(ValueError, match=message):
        refine_batch(finished, policy, 1, model=model)


def test_a_policy_that_raises_is_named_and_too_large_sizes_do_no_harm(model, finished):
    with pytest.raises(RuntimeError, match="mask policy Wrong raised ZeroDivisionError in iteration 1"):
        refine_batch(finished, Wrong(mask=lambda free: 1 / 0), 1, model=model)
    options = {"model": model, "schedule": Schedule(2, 0.5)}
    many = refine_batch(finished, Wrong(sizes=lambda free: free.sum(1) + 99), 1, **options)
    torch.testing.assert_close(many, refine_batch(finished, all_patches(), 1, **options))
