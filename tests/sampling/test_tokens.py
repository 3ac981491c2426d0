"""Vocabularies, and schedules of revealing and remasking tokens."""

import math
from fractions import Fraction

import pytest
import torch

from ipr_fast.sampling.remask import REMASKINGS, Cap, Conf, Loop, Remasking, Rescale
from ipr_fast.sampling.tokens import TokenSchedule, Vocabulary

# ---------------------------------------------------------------------------------------------------------- vocabulary


def test_the_mask_and_ids_that_are_never_sampled_are_forbidden():
    assert Vocabulary(10, 10).forbidden == ()
    assert Vocabulary(10, 3).forbidden == (3,)
    assert Vocabulary(10, 3, (9, 0, 9, 10)).forbidden == (0, 3, 9)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0, 0), "size must be an int in 1..262144, got 0"),
        ((2**18 + 1, 0), "size must be"),
        ((10, 11), r"mask_id must be an int in 0\.\.10, got 11"),
        ((10, 10, (11,)), r"never must be an int in 0\.\.10, got 11"),
        ((2, 0, (1,)), "must leave a token to sample"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Vocabulary(*arguments)


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"reveal": "all"}, "reveal must be one of count, independent, got 'all'"),
        ({"order": None}, "order must be one of random, confidence, margin, entropy, got None"),
        (
            {"remask": "some"},
            "remask must be None, one of cap, rescale, conf, loop, forward_backward, quality, or a strategy of",
        ),
        ({"remask": Remasking()}, "remask must be None, one of cap, .*, got Remasking"),
        ({"temperature": -0.1}, "temperature must be 0 or in "),
        ({"temperature": math.inf}, "temperature must be 0 or in "),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_k": 0}, "top_k must be an int >= 1, got 0"),
        ({"nucleus": "outer"}, "nucleus must be one of covering, inner, got 'outer'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        TokenSchedule(**arguments)


def test_a_name_stands_for_the_published_strategy():
    assert TokenSchedule(remask="cap").remask == Cap(0.008)
    assert TokenSchedule(remask="rescale").remask == Rescale(0.015)
    assert TokenSchedule(remask="loop").remask == Loop(0.55, 0.05, 0.9, 0.02)
    assert TokenSchedule(remask="conf").remask == Conf()
    assert TokenSchedule(remask=Cap(0.5)).remask == Cap(0.5)


@pytest.mark.parametrize("arguments", [{"on": 0.05}, {"off": 0}, {"on": 1}, {"eta": 2}, {"alpha": -1}])
def test_a_loop_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        Loop(**arguments)


def test_the_number_of_steps():
    assert [TokenSchedule().num_steps(n) for n in (0, 1, 9)] == [0, 1, 9]
    assert [TokenSchedule(4).num_steps(n) for n in (0, 1, 4, 9)] == [0, 1, 4, 4]
    for schedule in (TokenSchedule(4, remask="cap"), TokenSchedule(4, "independent")):
        assert [schedule.num_steps(n) for n in (0, 1, 9)] == [0, 4, 4]


@pytest.mark.parametrize("steps", [None, 1, 3, 10, 33])
def test_count_reveals_the_floor_of_the_share(steps):
    tables = TokenSchedule(steps).tables(40)
    assert tables.reveal is None
    assert tables.sigma is None
    for n in range(1, 41):
        total = n if steps is None else min(n, steps)
        assert int(tables.steps[n]) == total
        assert tables.visible[n, :total].tolist() == [n * (s + 1) // total for s in range(total)]
        assert (tables.visible[n, total:] == n).all()


@pytest.mark.parametrize("steps", [None, 7])
def test_independent_reveals_as_mdlm_does(steps):
    tables = TokenSchedule(steps, "independent").tables(9)
    for n in range(1, 10):
        total = steps or n
        expected = [Fraction(1, total) / (1 - Fraction(s, total)) for s in range(total)]
        torch.testing.assert_close(tables.reveal[n, :total], torch.tensor([float(p) for p in expected]))
        assert tables.reveal[n, total - 1] == 1


# The formulas of Wang et al. 2025 at t and t' < t, with alpha = 1 - t: sigma, and the largest that is possible.
PUBLISHED = {
    "cap": lambda alpha, new, most: min(0.008, most),
    "rescale": lambda alpha, new, most: 0.015 * most,
    "conf": lambda alpha, new, most: most,
    "forward_backward": lambda alpha, new, most: min((new - alpha) / alpha, most) if alpha else most,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sigma_is_that_of_the_published_formula(name):
    total = 25
    tables = TokenSchedule(total, "independent", remask=name).tables(5)
    for s in range(total):
        alpha, new = Fraction(s, total), Fraction(s + 1, total)
        most = min(1, (1 - new) / alpha) if alpha else 1
        sigma = PUBLISHED[name](float(alpha), float(new), float(most))
        assert tables.sigma[5, s].item() == pytest.approx(sigma, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", [None, *REMASKINGS])
@pytest.mark.parametrize("total", [5, 20, 64])
def test_the_visible_share_is_alpha_after_every_step(name, total):
    """Independent steps from alpha: visible ones stay with 1 - sigma, masked ones are revealed."""
    schedule = TokenSchedule(total, "independent", remask=name)
    tables, strategy = schedule.tables(3), schedule.remask or Remasking()
    assert (tables.reveal >= 0).all()
    assert (tables.reveal <= 1).all()
    if strategy.by_confidence:
        return  # its sigma is divided among the visible positions
    share = 0.0
    for s in range(total):
        sigma = 0.0 if tables.sigma is None else tables.sigma[3, s].item()
        share = share * (1 - sigma) + (1 - share) * tables.reveal[3, s].item()
        alpha = strategy.visible(torch.tensor((s + 1) / total, dtype=torch.float64)).item()
        assert share == pytest.approx(alpha, abs=1e-6)
    assert tables.reveal[3, total - 1] == 1


def test_the_loop_reveals_holds_and_ends():
    tables = TokenSchedule(100, remask="loop").tables(50)
    visible, sigma = tables.visible[50], tables.sigma[50]
    assert visible[:45].tolist() == [2 * (s + 1) * 50 // 100 for s in range(45)]  # to 0.9 in 45 steps
    assert (visible[44:95] == 45).all()
    assert visible[95:].tolist() == [46, 47, 48, 49, 50]
    assert sigma.nonzero().flatten().tolist() == list(range(45, 95))
    assert (sigma[45:95] == torch.tensor(0.02)).all()


def test_steps_beyond_the_last_change_nothing():
    for name in (None, *REMASKINGS):
        tables = TokenSchedule(remask=name).tables(6)  # T = n, so rows are padded
        for n in range(1, 6):
            assert (tables.visible[n, n:] == n).all()
            assert tables.sigma is None or (tables.sigma[n, n:] == 0).all()
