"""A chain meets its own condition, whatever its place in the batch, its wave and its lane."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from conditioned_models import Labelled, LabelledBy, LabelledTokens, Prepared

import ipr_fast
from ipr_fast import Schedule, TokenSchedule, random_patches

BATCH = 16
LABELS = torch.arange(BATCH).flip(0)
RAGGED = torch.tensor([0, 16, 15, 1, 2, 3, 5, 7, 8, 10, 12, 14, 4, 6, 9, 11])  # clues of each chain


class Pair(NamedTuple):
    label: torch.Tensor
    weight: torch.Tensor


class Chains:
    """Sixteen ragged chains with as many labels, generated and refined, all together or some of them."""

    def __init__(self, model, condition=LABELS):
        generator = torch.Generator().manual_seed(2)
        self.model, self.condition = model, condition
        if isinstance(model, LabelledTokens):
            values, count = torch.randint(0, 2, (BATCH, model.length), generator=generator), model.length
            self.schedules = TokenSchedule(5), TokenSchedule(4, order="entropy")
        else:
            values, count = torch.randn(BATCH, 1, 16, 16, generator=generator).clamp(-1, 1), 16
            self.schedules = Schedule(3, 0.5), Schedule(4, 0.8)
        self.known = torch.rand(BATCH, count, generator=generator).argsort(1).argsort(1) < RAGGED[:, None] * count // 16
        self.values = values

    def run(self, rows=slice(None), mask_fn=None, **options):
        """Generate and refine; a mask_fn gives chains different numbers of patches, and their waves other orders."""
        condition = self.condition
        if isinstance(condition, torch.Tensor):
            condition = condition[rows]
        elif isinstance(condition, dict):
            condition = {name: each[rows] for name, each in condition.items()}
        else:
            condition = (
                type(condition)(*(each[rows] for each in condition))
                if isinstance(condition, Pair)
                else tuple(each[rows] for each in condition)
            )
        ids, known = torch.arange(BATCH)[rows], self.known[rows]
        common = {"model": self.model, "known": known, "chain_ids": ids, "condition": condition, "seed": 5, **options}
        x = ipr_fast.generate_batch(len(ids), known_values=self.values[rows], schedule=self.schedules[0], **common)
        policy = random_patches(0.5) if mask_fn is None else mask_fn
        return ipr_fast.refine_batch(x, policy, 3, schedule=self.schedules[1], **common)


def more_each_time(x, iteration):
    """A mask that depends on a chain's values alone: another order of lengths in every iteration."""
    scores = x.flatten(1).double().sin()
    parts = scores.unflatten(1, (16, -1)).sum(-1) if scores.shape[1] == 256 else scores
    return (parts * (iteration + 1)).frac() > 0


def same(found, expected):
    """Tokens are equal, images to the rounding of functions that compute several numbers at a time."""
    torch.testing.assert_close(found, expected, atol=1e-5 if found.is_floating_point() else 0, rtol=0)


WAYS = {
    "together": {},
    "three at a time": {"max_chains": 3},
    "reference": {"backend": "reference"},
}
MODELS = {"patches": Labelled, "prepared": Prepared, "tokens": LabelledTokens}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mask_fn", [None, more_each_time], ids=["policy", "mask_fn"])
def test_each_chain_equals_its_run_alone(model, mask_fn):
    chains = Chains(MODELS[model]())
    alone = torch.cat([chains.run([chain], mask_fn) for chain in range(BATCH)])
    for options in WAYS.values():
        same(chains.run(mask_fn=mask_fn, **options), alone)
    other = Chains(MODELS[model](), LABELS.roll(1)).run(mask_fn=mask_fn)
    assert (other != alone).flatten(1).any(1).sum() >= BATCH - 2  # one has clues alone, one a single free token


@pytest.mark.parametrize("model", MODELS)
def test_graphs_hold_the_rows_at_fixed_addresses(tape, model):
    """Other conditions of the same shapes replay the graphs of earlier calls."""
    chains = Chains(MODELS[model]())
    for condition in (LABELS, LABELS.roll(3)):
        chains.condition = condition
        before = len(tape.captured)
        found, expected = chains.run(max_chains=3), chains.run(backend="torch")
        same(found, expected)
    assert len(tape.captured) == before
    assert tape.replayed


@pytest.mark.parametrize("form", [dict, tuple, Pair])
def test_a_condition_keeps_its_form(form):
    weight = torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(7))
    condition = {dict: {"label": LABELS, "weight": weight}, tuple: (LABELS, weight), Pair: Pair(LABELS, weight)}[form]
    chains = Chains(LabelledBy(form), condition)
    alone = torch.cat([chains.run([chain]) for chain in range(BATCH)])
    same(chains.run(max_chains=3), alone)


def test_other_shapes_and_types_take_other_graphs(tape):
    class Summed(Labelled):
        def of_rows(self, condition):
            return condition.float().flatten(1).sum(1)[:, None, None].sin()

    model, x = Summed(), torch.zeros(4, 1, 16, 16)
    for condition in (torch.rand(4, 1), torch.rand(4, 3), torch.rand(4, 3).double(), torch.ones(4, 3).bool()):
        options = {"model": model, "schedule": Schedule(2), "condition": condition}
        found = ipr_fast.refine_batch(x, random_patches(), 2, **options)
        same(found, ipr_fast.refine_batch(x, random_patches(), 2, backend="torch", **options))


def test_guidance_gives_its_rows_the_chains_condition():
    """Every row of a chain has the chain's label: each chain equals its run alone."""

    def reward(x):
        return (x == 1).sum(1).double()

    model, guidance = LabelledTokens(), ipr_fast.IterRef(reward, 0.5, levels=(0.5,), moves=2, candidates=2)

    def run(rows):
        return ipr_fast.generate_batch(
            len(LABELS[rows]),
            model=model,
            schedule=TokenSchedule(4),
            condition=LABELS[rows],
            chain_ids=torch.arange(BATCH)[rows],
            guidance=guidance,
            max_chains=5,
        )

    assert torch.equal(run(slice(None)), torch.cat([run([chain]) for chain in range(BATCH)]))


# ------------------------------------------------------------------------------------------------------------- errors


class Row(torch.nn.Module):
    """Takes no condition."""

    grid = Labelled.grid

    def forward(self, patches, levels, active=None):
        raise AssertionError("not called")


BAD = {
    r"condition: Row takes none, as its forward\(\) has no argument `condition`": (Row(), torch.zeros(4)),
    r"condition must be given: Labelled needs one, got None": (Labelled(), None),
    r"condition must have a row for each of the 4 chains, got \(3,\) of torch.int64": (Labelled(), torch.arange(3)),
    r"condition must have a row for each of the 4 chains, got \(\) of torch.float32": (Labelled(), torch.tensor(1.0)),
    r"condition\['b'\] must have a row for each of the 4 chains, got \(5, 2\)": (
        Labelled(),
        {"a": torch.zeros(4), "b": torch.zeros(5, 2)},
    ),
    r"condition must be a tensor, or a dict or tuple of tensors, got a list": (Labelled(), [torch.zeros(4)]),
    r"condition must be a tensor, or a dict or tuple of tensors, got a dict with int": (Labelled(), {"a": 4}),
    r"condition must be a tensor, or a dict or tuple of tensors, got a tuple with nothing": (Labelled(), ()),
    r"condition\[1\] must be on cpu, got meta": (Labelled(), (torch.zeros(4), torch.zeros(4, device="meta"))),
    r"condition must have no NaN": (Labelled(), torch.tensor([0.0, 1.0, float("nan"), 2.0])),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_condition_is_a_value_error(message):
    model, condition = BAD[message]
    with pytest.raises(ValueError, match=message):
        ipr_fast.refine_batch(torch.zeros(4, 1, 16, 16), random_patches(), 2, model=model, condition=condition)
    with pytest.raises(ValueError, match=message):
        ipr_fast.generate_batch(4, model=model, condition=condition)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_model_must_not_write_into_its_condition(backend):
    class Writes(Labelled):
        def forward(self, patches, levels, active=None, *, condition):
            condition[0] = 1
            return super().forward(patches, levels, active, condition=condition)

    with pytest.raises(ValueError, match="Writes writes into its input `condition`"):
        ipr_fast.generate_batch(4, model=Writes(), condition=torch.zeros(4, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_ordered_dict_reaches_the_model_as_one(backend):
    condition = OrderedDict(weight=torch.ones(4, 16), label=torch.arange(4))
    seen = []

    class Seeing(Labelled):
        def of_rows(self, condition):
            seen.append((type(condition), list(condition)))
            return super().of_rows(condition["label"])

    ipr_fast.generate_batch(4, model=Seeing(), condition=condition, schedule=Schedule(2, 1.0), backend=backend)
    assert set(map(str, seen)) == {str((OrderedDict, ["weight", "label"]))}


class OneTo(Labelled):
    """Whose labels begin with 1: 0, which nobody gives, is an error."""

    def of_rows(self, condition):
        return self.shift.index_select(0, condition - 1)[:, None, None]


@pytest.mark.parametrize("batch", [4, 65])
@pytest.mark.parametrize("max_chains", ["auto", 3])
def test_no_model_is_called_with_a_condition_that_nobody_gave(batch, max_chains, tape):
    """Neither to count bytes, nor to capture, nor on lanes without a chain."""
    labels = 1 + torch.arange(batch) % 16
    options = {"model": OneTo().eval(), "condition": labels, "schedule": Schedule(1), "max_chains": max_chains}
    x = ipr_fast.generate_batch(batch, **options)
    for backend in ("auto", "graphs"):
        ipr_fast.refine_batch(x, random_patches(0.2), 1, backend=backend, **options)
    assert tape.replayed
