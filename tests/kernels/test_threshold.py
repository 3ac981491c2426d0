"""The twin of kernels/threshold.py: the kept sets of float64, ties, and arguments."""

import pytest
import torch

from ipr_fast.kernels.logits import LOWEST
from ipr_fast.kernels.threshold import threshold

EQUAL = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, float("-inf")])


def kept(logits, **options):
    """Which ids (B, A, V) stay."""
    shape = logits.shape[:2]
    found = threshold(logits, index=torch.zeros(shape, dtype=torch.int32), out=torch.empty(shape), **options)
    return logits >= found[..., None]


def by_definition(logits, temperature, top_k, top_p, nucleus):
    """The same, id by id, in float64; and the least difference of a mass from top_p."""
    stays, least = torch.zeros(logits.shape, dtype=torch.bool), 1.0
    for b in range(logits.shape[0]):
        for a in range(logits.shape[1]):
            row = logits[b, a].double()
            larger = row[None, :] > row[:, None]
            left = torch.ones_like(row, dtype=torch.bool) if top_k is None else larger.sum(1) < top_k
            mass = (row / temperature).masked_fill(~left, -torch.inf).softmax(0)
            above, with_ties = (mass * larger).sum(1), (mass * ~larger.T).sum(1)
            if top_p < 1 and nucleus == "inner":
                left &= (with_ties <= top_p) | (row == row.max())
            elif top_p < 1:
                left &= above < top_p
            stays[b, a] = left
            least = min(least, ((with_ties if nucleus == "inner" else above) - top_p).abs().min().item())
    return stays, least


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 50, 700])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("nucleus", ["covering", "inner"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (None, 0.3), (4, 1.0), (20, 0.6), (2000, 0.99)])
def test_the_kept_ids_are_those_of_the_definition(vocabulary, ties, nucleus, top_k, top_p, generator):
    logits = 2 * torch.randn(2, 5, vocabulary, generator=generator)
    if ties:
        logits = (2 * logits).round() / 2
    for temperature in (1.0, 0.7):
        expected, least = by_definition(logits, temperature, top_k, top_p, nucleus)
        assert top_p == 1 or least > 1e-6  # no mass is so near to top_p that float32 could see it on the other side
        found = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, nucleus=nucleus)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, 4),
        ({"top_k": 4}, 4),
        ({"top_k": 5}, 6),
        ({"top_p": 0.01}, 4),
        ({"top_p": 0.84}, 4),
        ({"top_p": 0.95}, 6),
        ({"top_p": 0.5, "nucleus": "inner"}, 4),
        ({"top_p": 0.99, "nucleus": "inner"}, 4),
        ({"top_k": 4, "top_p": 0.99}, 4),
        ({}, 7),
        ({"top_k": 7}, 7),
        ({"top_k": 100}, 7),
    ],
    ids=str,
)
def test_equal_logits_are_kept_or_left_out_together(options, expected):
    """Four of the six have 84.5 % of the mass; -inf has none."""
    logits = EQUAL.expand(1, 2, 7)
    shape = (1, 2)
    found = threshold(logits, index=torch.zeros(shape, dtype=torch.int32), out=torch.empty(shape), **options)
    assert (logits.clamp(min=LOWEST) >= found[..., None]).sum(-1).tolist() == [[expected] * 2]


def test_zeros_of_either_sign_are_equal():
    assert kept(torch.tensor([[[0.0, -0.0, -1.0]]]), top_k=1).sum() == 2


def test_forbidden_ids_have_no_mass_and_no_rank(generator):
    logits = torch.randn(2, 3, 40, generator=generator)
    forbidden = torch.rand(40, generator=generator) < 0.4
    for options in ({"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.6, "nucleus": "inner"}):
        found = kept(logits, forbidden=forbidden, **options)[..., ~forbidden]
        assert torch.equal(found, kept(logits[..., ~forbidden].contiguous(), **options))


def test_padding_keeps_all_and_is_not_read():
    logits, index = torch.full((1, 2, 5), torch.nan), torch.tensor([[-1, 0]], dtype=torch.int32)
    logits[0, 1] = torch.arange(5.0)
    found = threshold(logits, index=index, out=torch.empty(1, 2), top_k=2)
    assert found.tolist() == [[torch.tensor(LOWEST).item(), 3.0]]
    assert threshold(logits[:0], index=index[:0], out=torch.empty(0, 2), top_k=2).shape == (0, 2)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.5, "nucleus": "inner"}], ids=str)
def test_rows_without_a_law_are_no_error(options):
    logits = torch.tensor([[[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf] * 3]])
    kept(logits, **options)
    kept(logits[..., :1], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"nucleus": "outer"}, 'nucleus must be "covering" or "inner", got \'outer\''),
        ({"temperature": 0.0}, "temperature must be in \\[1e-06, 1e\\+06\\], got 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kept(torch.zeros(1, 2, 3), **options)
