"""Arms: what each does to the same chains, and what it costs."""

import pytest
import torch
from small_models import TINY_TOKENS, randomise

import ipr_fast
from ipr_fast.evaluation.arms import Arm, Chains, Given
from ipr_fast.models import PatchTransformer, PatchTransformerConfig, TokenTransformer
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.token_sudoku import GridJudge

QUICK = {"width": 16, "depth": 1, "num_heads": 1, "generate_schedule": (2, 0.9), "refine_schedule": (3, 0.9)}
IDS = torch.tensor([7, 3, 2**31])


@pytest.fixture(scope="module")
def images():
    return randomise(PatchTransformer(PatchTransformerConfig(3, 32, 16, **QUICK)), seed=0)


@pytest.fixture(scope="module")
def chains(images):
    return Chains(images, EvenPixels().judge(), IDS, seed=5)


def followed(chains, arm, at=None):
    found = {}
    chains.follow(arm, lambda iteration, x, report: found.update({iteration: (x, report)}), at)
    return found


def test_an_arm_is_a_call_of_generate_and_one_of_refine(chains, images):
    common = {"model": images, "seed": 5, "chain_ids": IDS, "stochasticity": 0.25, "temperature": 0.5}
    start = ipr_fast.generate_batch(3, schedule=ipr_fast.Schedule(3, 0.5), **common)
    expected = ipr_fast.refine_batch(start, ipr_fast.random_patches(0.5, fixed=True), 2, noise="fixed", **common)
    schedule = {"steps_per_patch": 3, "overlap": 0.5}
    arm = Arm("x", 2, "fixed", 0.5, "fixed", schedule, None, stochasticity=0.25, temperature=0.5)
    found = followed(chains, arm)
    assert list(found) == [0, 1, 2]
    assert torch.equal(found[0][0], start)
    assert torch.equal(found[2][0], expected)
    assert list(followed(chains, arm, frozenset({2}))) == [0, 2]


def test_arms_that_start_alike_share_their_start(chains):
    assert chains.start(Arm("a")) is chains.start(Arm("b", 3, "all"))
    assert chains.start(Arm("c", stochasticity=0.0)) is not chains.start(Arm("a"))


def test_independent_samples_only_get_better(chains):
    found = followed(chains, Arm("best of 4", 3, "independent"))
    surplus = torch.stack([report.imbalance for _, report in found.values()])
    assert (surplus.diff(dim=0) <= 0).all()
    for x, report in found.values():
        assert torch.equal(chains.judge(x).imbalance, report.imbalance)


def test_acceptance_at_temperature_0_never_gets_worse(chains):
    found = followed(chains, Arm("greedy", 4, accept=0.0))
    surplus = torch.stack([report.imbalance for _, report in found.values()])
    assert (surplus.diff(dim=0) <= 0).all()


def test_costs_are_those_of_the_schedules(chains):
    own, again = ipr_fast.Schedule(2, 0.9).steps(4), ipr_fast.Schedule(3, 0.9).steps(1)
    calls, evaluations, rewards = chains.costs(Arm("IPR", 2), 2)
    assert calls.tolist() == [own + 2 * again] * 3
    assert evaluations.tolist() == [4 + 4 * own + 2 * (4 + again)] * 3
    assert rewards.tolist() == [0] * 3
    assert chains.costs(Arm("best of 3", 2, "independent"), 2).calls.tolist() == [3 * own] * 3
    assert chains.costs(Arm("best of 3", 2, "independent"), 2).rewards.tolist() == [3] * 3
    assert chains.costs(Arm("greedy", 2, accept=0.0), 1).rewards.tolist() == [2] * 3
    every = chains.costs(Arm("all", 1, "all", refine={"steps_per_patch": 2, "overlap": 0.9}), 1)
    assert every.calls.tolist() == [2 * own] * 3


def test_tokens_have_their_own_schedules_clues_and_swaps():
    model = randomise(TokenTransformer(TINY_TOKENS), seed=0)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[0, :4] = True
    boards = torch.tensor([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]).expand(3, 16)
    chains = Chains(model, GridJudge(4), IDS, given=Given(known, boards), boards=lambda: boards)
    found = followed(chains, Arm("IPR", 2, refine={"steps": 2, "order": "margin"}))
    assert torch.equal(found[2][0][known], boards[known])
    steps = {"steps": 5}
    assert chains.costs(Arm("short", generate=steps), 0).calls.tolist() == [5, 5, 5]
    assert chains.costs(Arm("own"), 0).calls.tolist() == [12, 16, 16]
    swapped = followed(chains, Arm("K = 2", swapped=2))[0][0]
    assert ((swapped != boards).sum(1) <= 4).all()
    assert chains.costs(Arm("K = 2", 3, swapped=2), 0).calls.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="arm x: generate must hold arguments of TokenSchedule"):
        chains.start(Arm("x", generate={"overlap": 0.5}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"policy": "best"},
            "arm x: policy must be one of random, fixed, uncertain, violating, all, independent, got 'best'",
        ),
        ({"noise": "none"}, "arm x: noise must be one of random, fixed"),
        ({"iterations": -1}, "arm x: iterations must be an int >= 0, got -1"),
        ({"ratio": 0}, "ratio must be a number in"),
        ({"policy": "independent", "swapped": 1}, "independent samples start from noise"),
        ({"name": "a|b"}, "an arm must have a name without |"),
    ],
)
def test_wrong_settings_of_an_arm_are_told(values, said):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        Arm(**{"name": "x", **values})


def test_swaps_need_boards(chains):
    with pytest.raises(ValueError, match="the task has no boards whose cells could be swapped, got 1 pairs"):
        chains.start(Arm("x", swapped=1))
