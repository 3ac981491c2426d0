import math

import pytest
import torch

from ipr_fast.kernels.gumbel import from_words, row_gumbels
from ipr_fast.kernels.philox import STREAM_TOKENS, philox_4x32

WORD = 2**32 - 1


def exactly(high, low):
    """In float64, and the error that float32 may make of it."""
    u = ((high.double() * 2.0**32 + low.double() + 0.5) * 2.0**-64).clamp(max=1 - 2**-24)
    exponential = -torch.log1p(-u)
    number = -exponential.log()
    rounding = 2**-24 * (6 + number.abs()) + 2**-24 * u / ((1 - u) * exponential)  # of functions; of u
    return number, rounding


def test_numbers_are_exact_to_rounding_over_the_whole_range(generator):
    high, low = torch.randint(0, 2**32, (2, 100_000), generator=generator)
    high[:40_000] >>= torch.arange(40_000) % 33  # small u, whose precision makes the tail
    high[40_000:50_000] |= 0xFFFF0000
    ends = torch.tensor([[0, 0, 0, WORD, WORD, 1], [0, 1, WORD, 0, WORD, 0]])
    high, low = torch.cat([high, ends[0]]), torch.cat([low, ends[1]])
    found, (expected, rounding) = from_words(high, low), exactly(high, low)
    assert ((found.double() - expected).abs() <= rounding).all()


def test_the_ends_are_finite():
    first, last = from_words(torch.tensor([0, WORD]), torch.tensor([0, WORD])).tolist()
    assert first == pytest.approx(65 * math.log(2), rel=1e-6)
    assert last == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_numbers_have_the_law_of_gumbel():
    place, ids = torch.arange(256), torch.arange(256) + 2**31
    numbers = row_gumbels(1024, place, torch.tensor(3), ids, torch.tensor(9)).double().flatten().sort().values
    share = torch.arange(1, len(numbers) + 1) / len(numbers)
    apart = (torch.exp(-torch.exp(-numbers)) - share).abs().max()
    assert apart * len(numbers) ** 0.5 < 2.2  # Kolmogorov-Smirnov, at 1e-4


def test_numbers_are_functions_of_their_counters():
    place, ids = torch.tensor([7 << 16 | 3, 5]), torch.tensor([11, 2**32 - 1])
    iteration, seed = torch.tensor(2**32 - 1), torch.tensor(-(2**63))
    found = row_gumbels(6, place, iteration, ids, seed)
    for row in range(2):
        for number in range(6):
            counter = [torch.tensor(STREAM_TOKENS << 28 | number // 2), place[row], iteration, ids[row]]
            words = philox_4x32(*counter, seed)
            assert found[row, number] == from_words(*words[number % 2 * 2 : number % 2 * 2 + 2])
    assert torch.equal(row_gumbels(2, place[1:], iteration, ids[1:], seed), found[1:, :2])
