import math

import pytest
import torch

from ipr_fast.evaluation import intervals


def outcomes(true: int, false: int) -> torch.Tensor:
    return torch.tensor([True] * true + [False] * false)


def test_score_interval_equals_published_examples():
    """Wilson's interval for 81 of 263 (Newcombe 1998, table I) and for 0 of 20."""
    estimate = intervals.share(outcomes(81, 182))
    assert (round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)) == (0.3080, 0.2553, 0.3662)
    estimate = intervals.share(outcomes(0, 20))
    assert estimate.low == pytest.approx(0, abs=1e-12)
    assert round(estimate.high, 4) == 0.1611


def test_paired_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits, runs, n = 0, 2000, 100
    for _ in range(runs):
        u = torch.rand(n, generator=generator)
        before, after = u < 0.7, (u < 0.65) | (u > 0.75)  # fixed with 0.25, broken with 0.05
        estimate = intervals.paired_gain(before, after)
        hits += estimate.low <= 0.2 <= estimate.high
    assert hits / runs == pytest.approx(0.95, abs=0.02)


def test_paired_interval_of_unchanged_samples_is_not_a_point():
    estimate = intervals.paired_gain(outcomes(5, 5), outcomes(5, 5))
    assert estimate.value == 0
    assert estimate.low < -0.1 < 0.1 < estimate.high


def test_no_samples_say_nothing():
    none = torch.zeros(0, dtype=torch.bool)
    assert math.isnan(intervals.share(none).value)
    assert intervals.share(none)[1:] == (0.0, 1.0)
    assert intervals.paired_gain(none, none)[1:] == (-1.0, 1.0)


def test_words():
    assert intervals.Estimate(0.5, 0.25, 0.75).percent() == "50.0 % [25.0, 75.0]"
    assert intervals.Estimate(0.1, -0.05, 0.2).points() == "+10.0 points [-5.0, +20.0]"


def test_a_mean_has_its_interval():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    value, low, high = intervals.mean(values)
    half = intervals.Z * (5 / 3) ** 0.5 / 2
    assert (value, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert intervals.mean_of(10.0, 30.0, 4) == pytest.approx((value, low, high))
    assert intervals.mean(torch.tensor([0, 1, 0, 0])).low == 0  # no measure is negative
    assert intervals.mean(torch.tensor([7])) == intervals.mean_of(7.0, 49.0, 1) == (7.0, None, None)
    assert intervals.mean(torch.tensor([7])).plain() == "7.00"
    assert intervals.Estimate(0.12345, 0.1, 0.15).plain() == "0.123 [0.100, 0.150]"
    assert intervals.Estimate(512.0, 8.0, 0.0).plain() == "512 [8.00, 0.00]"


def test_no_rounding_moves_the_end_of_an_interval_beyond_its_value():
    for n in range(1, 300):
        assert (intervals.share_of(0, n).low, intervals.share_of(n, n).high) == (0, 1)
