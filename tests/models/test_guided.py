"""Classifier-free guidance of patches and tokens."""

import re

import pytest
import torch
from conditioned_models import Labelled, LabelledBy, LabelledTokens, Prepared

import ipr_fast
from ipr_fast import ActivePatches, Schedule, TokenSchedule, random_patches
from ipr_fast.models import Guided, contract

LABELS = torch.tensor([3, 0, 7, 12])
NONE = torch.tensor(16)


def inputs(model, generator):
    """The arguments of a call for four rows, of which one has nothing active."""
    mask = (
        torch.rand(4, getattr(model, "length", 16), generator=generator) < torch.tensor([0.2, 0.0, 0.6, 1.0])[:, None]
    )
    active = ActivePatches.from_mask(mask)
    if isinstance(model, LabelledTokens):
        return torch.randint(0, 6, (4, model.length), generator=generator).masked_fill(mask, 6), active
    return torch.randn(4, 16, 16, generator=generator), torch.rand(active.index.shape, generator=generator), active


@pytest.mark.parametrize("model", [Labelled, Prepared, LabelledTokens])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_it_goes_beyond_the_condition_by_its_difference(model, scale, generator):
    model = model()
    arguments, guided = inputs(model, generator), Guided(model, scale, NONE)
    found = guided(*arguments, condition=LABELS)
    given, without = (model(*arguments, condition=each) for each in (LABELS, NONE.expand(4)))
    for name, field in found._asdict().items():
        if name in ("velocity", "logits"):
            one, none = getattr(given, name), getattr(without, name)
            torch.testing.assert_close(field, none + scale * (one - none), atol=1e-5, rtol=0)
            assert (one != none).any()
        elif field is not None:
            torch.testing.assert_close(field, getattr(given, name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [Labelled, Prepared, LabelledTokens])
def test_each_chain_equals_its_run_alone(model, tape):
    """In lanes that chains leave, and on graphs; a context is prepared for both rows."""
    guided = Guided(model(), 2.0, NONE)
    assert contract.prepares(guided) == (model is Prepared)
    is_tokens = model is LabelledTokens
    known = torch.arange(11 if is_tokens else 16) < torch.tensor([0, 9, 4, 1])[:, None]
    known_values = torch.ones(4, 11, dtype=torch.int64) if is_tokens else torch.zeros(4, 1, 16, 16)
    schedule = TokenSchedule(5) if is_tokens else Schedule(3, 0.5)

    def run(rows, **options):
        common = {"model": guided, "known": known[rows], "chain_ids": torch.arange(4)[rows], "condition": LABELS[rows]}
        common |= {"schedule": schedule, **options}
        x = ipr_fast.generate_batch(len(LABELS[rows]), known_values=known_values[rows], **common)
        return ipr_fast.refine_batch(x, random_patches(0.5), 2, **common)

    alone = torch.cat([run([chain], backend="reference") for chain in range(4)])
    for options in ({"backend": "torch"}, {"backend": "torch", "max_chains": 3}, {"max_chains": 3}):
        torch.testing.assert_close(run(slice(None), **options), alone, atol=0 if is_tokens else 1e-4, rtol=0)
    assert tape.replayed


def test_a_model_may_say_what_no_condition_is():
    model = Labelled()
    model.unconditional = NONE
    model.value_range = (-2.0, 2.0)
    guided = Guided(model, 3)
    assert guided.value_range == (-2.0, 2.0)
    assert guided.grid is model.grid
    weight = torch.rand(16)
    both = Guided(LabelledBy(dict), 1.0, {"label": NONE, "weight": weight})
    condition = {"label": LABELS, "weight": torch.rand(4, 16)}
    x = ipr_fast.generate_batch(4, model=both, schedule=Schedule(2), condition=condition)
    plain = ipr_fast.generate_batch(4, model=LabelledBy(dict), schedule=Schedule(2), condition=condition)
    torch.testing.assert_close(x, plain, atol=1e-4, rtol=0)


def test_tokens_that_are_impossible_stay_so(generator):
    class Never(LabelledTokens):
        def forward(self, tokens, active=None, *, condition):
            prediction = super().forward(tokens, active, condition=condition)
            prediction.logits[..., 4] = -torch.inf
            prediction.logits[::2, :, 3] = -torch.inf  # with the condition alone
            prediction.logits[1::2, :, 1] = -torch.inf  # without it alone
            return prediction

    logits = Guided(Never(), 2.0, NONE)(*inputs(Never(), generator), condition=LABELS).logits
    assert not logits.isnan().any()
    assert (logits[..., 3:5] == -torch.inf).all()
    assert logits[..., :3].isfinite().all()


def test_scale_0_is_the_model_without_its_condition_and_1_with_it(generator):
    class Never(LabelledTokens):
        def forward(self, tokens, active=None, *, condition):
            prediction = super().forward(tokens, active, condition=condition)
            prediction.logits[..., 4] = -torch.inf
            prediction.logits[condition == NONE, :, 3] = -torch.inf
            prediction.logits[condition != NONE, :, 1] = -torch.inf
            return prediction

    model, arguments = Never(), inputs(Never(), generator)
    for scale, condition in ((0, NONE.expand(4)), (1, LABELS)):
        found = Guided(model, scale, NONE)(*arguments, condition=LABELS).logits
        torch.testing.assert_close(found, model(*arguments, condition=condition).logits, atol=1e-5, rtol=0)
    between = Guided(model, 0.5, NONE)(*arguments, condition=LABELS).logits
    assert (between[..., [1, 3, 4]] == -torch.inf).all()
    assert between[..., [0, 2]].isfinite().all()


def test_a_cast_model_takes_conditions_of_its_type():
    guided = Guided(LabelledBy(dict), 2.0, {"label": NONE, "weight": torch.ones(16)}).to(torch.bfloat16)
    assert guided.layout.dtypes == (torch.int64, torch.bfloat16)


def test_bad_arguments_are_named():
    class Plain(Labelled):
        def forward(self, patches, levels, active=None):
            raise AssertionError("not called")

    for arguments, message in (
        ((Plain(), 1.0, NONE), "condition: Plain takes none"),
        ((Labelled(), -1.0, NONE), "scale must be a finite number >= 0, got -1.0"),
        ((Labelled(), 1.0), "unconditional must be given, as Labelled has no attribute of that name"),
        ((Labelled(), 1.0, 16), "unconditional must be a tensor, or a dict or tuple of tensors, got a int"),
    ):
        with pytest.raises(ValueError, match=message):
            Guided(*arguments)
    with pytest.raises(ValueError, match="unconditional must be like a chain's condition"):
        ipr_fast.generate_batch(4, model=Guided(Labelled(), 1.0, torch.zeros(3)), condition=LABELS)
    with pytest.raises(ValueError, match="condition must be given: Guided needs one, got None"):
        ipr_fast.generate_batch(4, model=Guided(Labelled(), 1.0, NONE))


def test_the_keys_of_a_dict_may_come_in_any_order(generator):
    none = {"weight": torch.full((16,), 0.5), "label": NONE}
    model, arguments = LabelledBy(dict), inputs(Labelled(), generator)
    given = {"label": LABELS, "weight": torch.rand(4, 16, generator=generator)}
    found = Guided(model, 2.0, none)(*arguments, condition=given)
    without = {"label": NONE.expand(4), "weight": none["weight"].expand(4, 16)}
    one, other = (model(*arguments, condition=each).velocity for each in (given, without))
    torch.testing.assert_close(found.velocity, other + 2 * (one - other), atol=1e-5, rtol=0)


def test_an_unconditional_that_does_not_fit_is_described_in_words(generator):
    guided = Guided(LabelledBy(dict), 2.0, {"label": NONE})
    given = {"label": LABELS, "weight": torch.ones(4, 16)}
    expected = (
        "condition, a dict of 'label': () of int64, 'weight': (16,) of float32, got a dict of 'label': () of int64"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        guided(*inputs(Labelled(), generator), condition=given)
    with pytest.raises(ValueError, match=r"unconditional\['weight'\] must have no NaN"):
        Guided(LabelledBy(dict), 2.0, {"label": NONE, "weight": torch.full((16,), torch.nan)})
