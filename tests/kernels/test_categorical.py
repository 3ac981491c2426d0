"""The twin of kernels/categorical.py: its law, its statistics in float64, rows without a token."""

import pytest
import torch
from support import definitions

from ipr_fast.kernels import categorical as file
from ipr_fast.kernels.categorical import CLASSES, Drawn, categorical
from ipr_fast.kernels.logits import LOWEST, Rows
from ipr_fast.kernels.philox import seed_tensor

HEAD = 0.998


class OneRow(Rows):
    """The same row of logits for every slot, whose sums are computed once."""

    def sums(self, classes, inverse, threshold):
        found = Rows(self.logits[:1], self.forbidden).sums(classes, inverse, threshold)
        return [each.expand(len(self.logits), -1) for each in found]


def many(logits, number, temperature=1.0, threshold=None, forbidden=None):
    """Draw `number` tokens from logits (V,), each for a chain of its own."""
    tokens = []
    for ids in torch.arange(number).split(1000):
        rows = OneRow(logits.expand(len(ids), -1), forbidden)
        counter = (torch.full_like(ids, 5 << 16 | 9), torch.tensor(1), ids, seed_tensor(3, "cpu"))
        limit = None if threshold is None else torch.full((1, 1), threshold)
        tokens.append(file._draw(rows, counter, temperature, limit).token)
    return torch.cat(tokens)


def chi_square(counts, expected):
    """The statistic in standard deviations of its law."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (len(counts) - 1)) / (2 * (len(counts) - 1)) ** 0.5


def slots(batch, number, seed=5):
    counters = {"iteration": torch.tensor(3), "chain_ids": torch.arange(batch) * 7, "seed": seed_tensor(seed, "cpu")}
    index = torch.arange(number, dtype=torch.int32).repeat(batch, 1)
    return {"index": index, "step": torch.arange(batch) - 1, **counters, "out": Drawn.empty(batch, number, "cpu")}


@pytest.mark.parametrize(("vocabulary", "temperature"), [(10, 1.0), (257, 0.7), (1000, 1.0), (1500, 1.6)])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_law_is_that_of_the_logits(vocabulary, temperature, restricted, generator):
    logits, number = torch.randn(vocabulary, generator=generator), 30_000
    forbidden, threshold = torch.zeros(vocabulary, dtype=torch.bool), None
    if restricted:
        forbidden[logits.argmax()], threshold = True, -0.25
    law = (logits.double() / temperature).masked_fill(forbidden, -torch.inf)
    law = law.masked_fill(logits < (LOWEST if threshold is None else threshold), -torch.inf).softmax(0)
    tokens = many(logits, number, temperature, threshold, forbidden if restricted else None)
    counts = tokens.bincount(minlength=vocabulary).double()
    assert (counts[law == 0] == 0).all()
    assert chi_square(counts[law > 0], number * law[law > 0]) < 5


def test_a_tail_of_a_hundred_thousand_ids_keeps_its_mass():
    """Of 0.2 %: with uniforms of 24 bits a fifteenth of it is left."""
    vocabulary, number, head = 126_464, 40_000, 70_000
    logits = torch.full((vocabulary,), (1 - HEAD) / (vocabulary - 1)).log()
    logits[head] = torch.tensor(HEAD).log()
    tokens = many(logits, number)
    tail = tokens[tokens != head]
    expected = number * (1 - HEAD)
    assert abs(len(tail) - expected) < 5 * expected**0.5
    ranges = (tail * 8 // vocabulary).bincount(minlength=8).double()
    assert chi_square(ranges, torch.full((8,), len(tail) / 8)) < 5
    classes = (tail % CLASSES // 32).bincount(minlength=8).double()
    assert chi_square(classes, torch.full((8,), len(tail) / 8)) < 5


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 10, 127, 256, 257, 1024, 5000, 2**18])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_and_statistics_are_those_of_the_formula_in_float64(vocabulary, temperature, generator):
    logits = 3 * torch.randn(2, 3, vocabulary, generator=generator)
    options = slots(2, 3)
    found = categorical(logits, temperature=temperature, **options)
    expected = definitions.categorical(logits, temperature, 5, options["step"] + 1, 3, options["chain_ids"])
    assert torch.equal(found.token, expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        # Differences of logits up to 40 and sums, a rounding each.
        torch.testing.assert_close(ours.double(), theirs, rtol=64 * 2**-24, atol=64 * 2**-24)


def test_certain_rows_keep_the_relative_precision_of_odds_gap_and_entropy(generator):
    logits = torch.randn(1, 64, 700, generator=generator)
    logits[0, torch.arange(64), torch.randint(0, 700, (64,), generator=generator)] = torch.arange(64) + 4.0
    options = slots(1, 64)
    found = categorical(logits, **options)
    expected = definitions.categorical(logits, 1.0, 5, options["step"] + 1, 3, options["chain_ids"])
    assert (found.confidence == 1).sum() > 20
    for ours, theirs in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=(67 + 8) * 2**-24, atol=0)


@pytest.mark.parametrize("vocabulary", [10, 3000])
def test_a_rounding_of_the_logits_hardly_ever_changes_a_token(vocabulary, generator):
    """So neither do those of another device's logarithms and sums."""
    logits = torch.randn(vocabulary, generator=generator)
    rounded = logits * (1 + 2**-23 * torch.randint(-1, 2, (vocabulary,), generator=generator))
    assert (many(logits, 20_000) != many(rounded, 20_000)).sum() <= 1


def test_a_token_depends_on_its_own_counters_and_logits_alone(generator):
    logits = torch.randn(4, 5, 700, generator=generator)
    whole = categorical(logits, **slots(4, 5))
    for chain in range(4):
        order = torch.randperm(5, generator=generator)
        options = slots(4, 5) | {"out": Drawn.empty(1, 5, "cpu")}
        for name in ("index", "step", "chain_ids"):
            options[name] = options[name][chain : chain + 1]
        options["index"] = options["index"][:, order].contiguous()
        alone = categorical(logits[chain : chain + 1, order], **options)
        assert all(torch.equal(one, all_[chain : chain + 1, order]) for one, all_ in zip(alone, whole, strict=True))
    for change in ({"seed": seed_tensor(6, "cpu")}, {"iteration": torch.tensor(4)}, {"step": torch.arange(4)}):
        assert (categorical(logits, **slots(4, 5) | change).token != whole.token).sum() > 10


@pytest.mark.parametrize("vocabulary", [7, 2000])
def test_temperature_0_takes_the_largest_logit_of_the_lowest_id(vocabulary, generator):
    logits = torch.randint(0, 3, (2, 40, vocabulary), generator=generator).float()
    if vocabulary == 2000:
        logits[0, 0, [5, 1030]] = 9.0  # of one lane a later id than of another
        logits[0, 1, [300, 556]] = 9.0  # of one class
    drawn = categorical(logits, temperature=0.0, **slots(2, 40))
    assert torch.equal(drawn.token, logits.argmax(-1))
    assert (drawn.log_probability == 0).all()
    threshold = torch.full((2, 40), LOWEST)
    assert torch.equal(categorical(logits, temperature=0.0, threshold=threshold, **slots(2, 40)).token, drawn.token)


@pytest.mark.parametrize("vocabulary", [5, 600])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_law_give_no_token(vocabulary, temperature, generator):
    logits = torch.randn(1, 6, vocabulary, generator=generator)
    forbidden = torch.zeros(vocabulary, dtype=torch.bool)
    forbidden[2] = True
    logits[0, 0, 3], logits[0, 1, 3], logits[0, 2] = torch.nan, torch.inf, -torch.inf
    logits[0, 3], logits[0, 3, 2] = -torch.inf, 1.0  # the one that is left is forbidden
    logits[0, 4, 2], logits[0, 5, 2] = torch.nan, torch.inf  # as these are
    drawn = categorical(logits, temperature=temperature, forbidden=forbidden, **slots(1, 6))
    assert (drawn.token[0, :4] == -1).all()
    assert ((drawn.token[0, 4:] >= 0) & (drawn.token[0, 4:] != 2)).all()
    for statistic in drawn[1:]:
        assert statistic[0, :4].isnan().all()
        assert statistic[0, 4:].isfinite().all()


def test_padding_slots_give_no_token_and_are_not_read(generator):
    logits, options = torch.randn(3, 4, 50, generator=generator), slots(3, 4)
    whole = categorical(logits, **slots(3, 4))
    padding = torch.rand(3, 4, generator=generator) < 0.5
    padding[1] = True
    options["index"][padding] = -1
    logits[padding] = torch.nan
    drawn = categorical(logits, **options)
    assert (drawn.token[padding] == -1).all()
    assert all((statistic[padding] == 0).all() for statistic in drawn[1:])
    assert all(torch.equal(ours[~padding], theirs[~padding]) for ours, theirs in zip(drawn, whole, strict=True))
    options["index"].fill_(-1)
    assert (categorical(logits, **options).token == -1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_read_as_float32(dtype, generator):
    logits = torch.randn(2, 3, 300, generator=generator).to(dtype)
    found, expected = categorical(logits, **slots(2, 3)), categorical(logits.float(), **slots(2, 3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_logits_may_be_part_of_a_wider_tensor_and_need_a_gradient(generator):
    wider = torch.randn(2, 6, 310, generator=generator).requires_grad_(True)
    part = wider[:, 1:4, 3:303]
    found, expected = categorical(part, **slots(2, 3)), categorical(part.detach().clone(), **slots(2, 3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_slots(shape):
    assert categorical(torch.zeros(*shape, 5), **slots(*shape)).token.shape == shape


@pytest.mark.parametrize(
    ("vocabulary", "temperature", "message"),
    [
        (0, 1.0, "logits must have 1 to 262,144 ids, got 0"),
        (2**18 + 1, 1.0, "logits must have 1 to 262,144 ids, got 262,145"),
        (5, -1.0, "temperature must be 0 or in \\[1e-06, 1e\\+06\\], got -1.0"),
        (5, 1e-9, "temperature must be 0 or in \\[1e-06, 1e\\+06\\], got 1e-09"),
        (5, float("nan"), "temperature must be 0 or in \\[1e-06, 1e\\+06\\], got nan"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(vocabulary, temperature, message):
    with pytest.raises(ValueError, match=message):
        categorical(torch.zeros(1, 2, vocabulary), temperature=temperature, **slots(1, 2))


def test_rows_that_are_not_contiguous_are_refused():
    with pytest.raises(ValueError, match=r"logits must have contiguous rows, got strides \(10, 1, 2\)"):
        categorical(torch.zeros(1, 5, 2).transpose(1, 2), **slots(1, 2))
