"""Breaches of a model's contract are named, in the engine, its graphs and the reference."""

import inspect
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from small_models import TINY, Network, randomise
from torch import nn

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, random_patches
from ipr_fast.models import PatchTransformer, contract
from ipr_fast.sampling.prediction import mix_range
from ipr_fast.tasks.catalog import DIGIT_SUDOKU, make_task

SCHEDULE = Schedule(2, 0.5)


# ---------------------------------------------------------------------------------------------- the variance mix


class Logits(Network):
    """Forgets the sigmoid."""

    def __init__(self, size=3.0):
        super().__init__()
        self.size = size

    def forward(self, patches, levels, active=None):
        prediction = super().forward(patches, levels, active)
        mix = torch.full_like(prediction.velocity, 0.5)
        mix[..., 0] = -self.size
        return prediction._replace(variance_mix=mix)


def test_a_mix_outside_its_bounds_gets_a_warning(run):
    with pytest.warns(RuntimeWarning, match=r"variance mix of Logits lies in \[-3, 0\.5\], expected \[0, 1\].*sigmoid"):
        run(Logits())


def test_generating_warns_of_a_mix_too():
    with pytest.warns(RuntimeWarning, match=r"variance mix of Logits lies in \[-3, 0\.5\]"):
        ipr_fast.generate_batch(2, model=Logits(), schedule=SCHEDULE)


def test_a_mix_within_the_models_own_bounds_gets_none(finished):
    model = Logits(size=0.5)
    model.mix_bounds = (-1.0, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, schedule=SCHEDULE)


def test_padding_slots_may_hold_any_mix():
    mix = torch.tensor([[[0.2], [9.0]], [[0.7], [0.4]]])
    found = mix_range(mix, torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.7]))


# ------------------------------------------------------------------------------------------------ optional methods


def test_methods_of_the_same_name_for_another_purpose_are_left_alone(run):
    class Busy(Network):
        def prepare(self):
            raise AssertionError

        def tabulate(self, rows):
            raise AssertionError

    torch.manual_seed(0)
    busy = Busy()
    assert not contract.prepares(busy)
    assert not contract.tabulates(busy)
    run(busy)


@pytest.mark.parametrize(
    ("method", "keyword", "wanted"),
    [("prepare", "context", r"prepare\(patches, active, out=None\)"), ("tabulate", "table", r"tabulate\(levels, out")],
)
def test_a_method_of_another_signature_is_named(finished, method, keyword, wanted):
    class Odd(Network):
        def forward(self, patches, levels, active=None, **more):
            return super().forward(patches, levels, active)

    setattr(Odd, method, lambda self: None)
    with pytest.raises(ValueError, match=rf"Odd\.{method} must be {wanted}.*takes `{keyword}`; got {method}\(\)"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=Odd())


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("context", lambda self, patches, active, out=None: None, "prepare must return a context, got None"),
        ("table", lambda self, levels, out=None: levels.clone(), "tabulate must overwrite `out` and return it"),
    ],
)
def test_methods_that_return_something_else_are_named(finished, name, call, message):
    class Odd(Network):
        def forward(self, patches, levels, active=None, **more):
            return super().forward(patches, levels, active)

    setattr(Odd, "prepare" if name == "context" else "tabulate", call)
    with pytest.raises(ValueError, match=f"model: {message}"):
        ipr_fast.refine_batch(finished, lambda x, i: torch.ones(12, 16, dtype=torch.bool), 2, model=Odd())


# ----------------------------------------------------------------------------------------------------------- rows


def test_the_rows_of_a_call_are_the_running_chains_as_the_protocol_says(finished):
    seen = []

    class Recorder(Network):
        def forward(self, patches, levels, active=None):
            seen.append(patches[:, 0, 0].tolist())
            return super().forward(patches, levels, active)

    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[:, 1] = True
    mask[7, 2:5] = True  # the longest chain
    ipr_fast.refine_batch(finished, lambda x, i: mask, 1, model=Recorder(), schedule=Schedule(2, 0.0), max_chains=5)
    first = finished[:, 0, 0, 0].tolist()
    assert seen[0] == [first[chain] for chain in (7, 0, 1, 2, 3)]  # sorted by length, five at a time
    assert seen[2] == [first[7]]  # the others have finished
    assert [first[11]] == [row[-1] for row in seen[-1:]]
    assert "Row b of a call is not row b of your x" in inspect.getdoc(ipr_fast.Denoiser).split("\n\n")[1]


# ----------------------------------------------------------------------------------------------- values and devices


@pytest.mark.parametrize(
    ("scale", "shift", "found"),
    [(0.5, 0.5, r"\[0, 1\]"), (127.5, 127.5, r"\[0, 255\]"), (128.0, 0.0, r"\[-128, 128\]")],
)
def test_samples_in_another_range_get_a_warning(model, finished, scale, shift, found):
    x = finished * scale + shift
    with pytest.warns(RuntimeWarning, match=rf"x lies in {found}, but PatchTransformer was trained on .*\[-1, 1\]"):
        ipr_fast.refine_batch(x, random_patches(), 1, model=model, schedule=SCHEDULE)
    known = torch.ones(12, 16, dtype=torch.bool)
    known[:, 0] = False
    with pytest.warns(RuntimeWarning, match=r"known_values lies in"):
        ipr_fast.generate_batch(12, model=model, known=known, known_values=x, schedule=SCHEDULE)


def test_samples_that_may_be_in_the_range_get_no_warning(model, finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (finished, finished * 1.5, torch.zeros_like(finished), finished[:0], -torch.ones_like(finished)):
            ipr_fast.refine_batch(x, random_patches(), 1, model=model, schedule=SCHEDULE)
        none_known = torch.zeros(12, 16, dtype=torch.bool)
        ipr_fast.generate_batch(
            12, model=model, known=none_known, known_values=finished + 9, schedule=SCHEDULE, stochasticity=0.0
        )


def samples_of(name, count):
    """Samples of a task; with "generated", those that the bundled model makes, which leave [-1, 1] a little."""
    if name == "generated":
        return ipr_fast.generate_batch(count, schedule=Schedule(4, 0.9))
    pytest.importorskip("sklearn")
    return make_task(name).sample(count, torch.Generator().manual_seed(0))


class Forbidden:
    """A model of samples in [-1, 1], for calls of no iterations."""

    value_range = (-1.0, 1.0)

    def __init__(self, x):
        _, channels, side, _ = x.shape
        self.grid = PatchGrid(channels, side, side, 8)

    def __call__(self, patches, levels, active=None):
        raise AssertionError


@pytest.mark.parametrize("name", [*DIGIT_SUDOKU, "even-pixels", "generated"])
def test_a_tenth_of_noise_hides_no_range_of_0_to_1_and_makes_no_false_alarm(name):
    """Neither for the samples of a task or a model, nor with noise."""
    x = samples_of(name, 16)
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for count in (1, 10, 16):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for right in (x, x + noise, x.half()):
                ipr_fast.refine_batch(right[:count], random_patches(), 0, model=Forbidden(x))
        wrong = ((x + 1) / 2 + noise)[:count]
        assert wrong.min() < 0
        told = (
            r"x lies in \[-0\.\d+, 1\.\d+\], 0 of 1[06] samples have a number below -0\.5, but Forbidden was trained on"
        )
        expected = pytest.warns(contract.RangeWarning, match=told) if count >= 10 else nullcontext()
        with expected:
            ipr_fast.refine_batch(wrong, random_patches(), 0, model=Forbidden(x))


def test_an_outlier_hides_no_range_of_0_to_1():
    x = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x[3, 0, 5, 5], x[60, 0, 2, 1] = -1.0, -3.0
    with pytest.warns(contract.RangeWarning, match="2 of 64 samples have a number below -0.5"):
        ipr_fast.refine_batch(x, random_patches(), 0, model=Forbidden(x))


def test_bright_samples_get_no_warning_while_half_of_them_have_a_dark_number():
    x = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.1
    x[::2, 0, 0, 0] = -0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.refine_batch(x, random_patches(), 0, model=Forbidden(x))
        grey = x * 0.3  # reaches neither end: not squeezed
        ipr_fast.refine_batch(grey, random_patches(), 0, model=Forbidden(x))


def test_the_bound_on_a_chance():
    """Never below the binomial's exact one, and exact where nothing happens."""
    for count in (1, 7, 10, 64):
        assert contract._bits_against(0, count) == count
        assert contract._bits_against(count, count) == contract._bits_against((count + 1) // 2, count) == 0
        for number in range(count // 2):
            exact = sum(math.comb(count, k) for k in range(number + 1)) / 2**count
            assert 0 <= contract._bits_against(number, count) <= -math.log2(exact)


def test_a_few_known_patches_may_be_bright(model, finished):
    known = torch.arange(16).expand(12, 16) == 0
    values = (finished + 1) / 2 - 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.generate_batch(12, model=model, known=known, known_values=values, schedule=SCHEDULE)


def test_a_model_without_a_range_gets_no_warning(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.refine_batch(finished + 50, random_patches(), 1, model=Network(), schedule=SCHEDULE)


@pytest.mark.parametrize("name", ["value_range", "mix_bounds"])
@pytest.mark.parametrize("value", ["-1, 1", (1,), (1, -1), (float("nan"), 1), 3])
def test_bounds_that_are_not_two_numbers_in_order_are_refused_before_any_work(finished, name, value):
    model = Network()
    setattr(model, name, value)
    with pytest.raises(ValueError, match=rf"model: {name} must be two numbers \(low, high\), got"):
        ipr_fast.refine_batch(finished, random_patches(), 0, model=model)


class WithoutActive(nn.Module):
    grid = PatchGrid(1, 16, 16, 4)

    def forward(self, patches, levels):
        return Prediction(patches)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithoutActive(), r"model: WithoutActive must be called as model\(patches, levels, active=None\), got"),
        (WithoutActive, r"model must be an instance, got the class WithoutActive"),
    ],
    ids=["no active", "class"],
)
def test_another_call_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        ipr_fast.refine_batch(torch.zeros(2, 1, 16, 16), ipr_fast.random_patches(), 1, model=model)


# ---------------------------------------------------------------------------------------------------- inputs of slots


class TakesAnything(PatchTransformer):
    """Whose calls do not name what they take."""

    slot_dtype = None

    def forward(self, *arguments, **options):
        assert "slots" not in options
        return super().forward(*arguments, **options)


def test_a_model_gets_its_slots_if_it_says_in_what_type(finished):
    model, plain = (randomise(cls(TINY), seed=0) for cls in (PatchTransformer, TakesAnything))
    assert contract.takes_slots(model)
    assert not contract.takes_slots(plain)
    found, expected = (
        ipr_fast.refine_batch(finished, random_patches(), 2, model=each, schedule=SCHEDULE) for each in (model, plain)
    )
    assert torch.equal(found, expected)
