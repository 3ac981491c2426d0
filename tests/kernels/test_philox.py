import math

import pytest
import torch

from ipr_fast.kernels.philox import (
    STREAM_CHOICE,
    STREAM_POSTERIOR,
    STREAM_RENOISE,
    _to_uniform,
    patch_keys,
    patch_normals,
    philox_4x32,
)

# The known-answer vectors that come with Random123 (Salmon et al. 2011) for philox4x32 with ten rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    result = philox_4x32(*words, seed=high << 32 | low)
    assert [int(word) for word in result] == [int(word, 16) for word in answer.split()]


def scalar_normals(seed, stream, step, patch, iteration, chain, numel):
    """The definition, one element at a time, on Python's integers."""
    out = []
    for quad in range(-(-numel // 4)):
        counter = (stream << 28 | quad, step << 16 | patch, iteration, chain)
        words = [int(w) for w in philox_4x32(*(torch.tensor(c) for c in counter), seed)]
        u = [(w if w < 2**31 else 2**32 - 1 - w) * 4.6566127342e-10 for w in words]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = math.sqrt(-2 * math.log(max(a, 1e-7)))
            out += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    return out[:numel]


def test_a_words_upper_half_is_folded_onto_its_lower():
    words = [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    folded = torch.tensor([word if word < 2**31 else 2**32 - 1 - word for word in words])
    found = _to_uniform(torch.tensor(words))
    assert torch.equal(found, folded.float() * 4.6566127342e-10)
    assert 0 <= found.min() <= found.max() < 1


def test_normals_follow_the_definition():
    seed, chains, patches = 2**63 + 12345, torch.tensor([0, 2**32 - 1, 7]), torch.tensor([[0, 65535], [3, 1], [5, 5]])
    normals = patch_normals(seed, STREAM_POSTERIOR, 300, 2**31 + 5, chains, patches, numel=10)
    for b in range(3):
        for a in range(2):
            args = (seed, STREAM_POSTERIOR, 300, int(patches[b, a]), 2**31 + 5, int(chains[b]), 10)
            # |normal| < 6; u is rounded to 2**-24, which moves the angle and the logarithm by a few ulps.
            torch.testing.assert_close(
                normals[b, a].double(), torch.tensor(scalar_normals(*args), dtype=torch.float64), atol=2e-5, rtol=0
            )


def test_a_chains_normals_do_not_depend_on_its_batch():
    patches = torch.arange(9).repeat(64, 1)
    ids = torch.randperm(64)
    whole = patch_normals(3, STREAM_RENOISE, 0, 4, ids, patches, numel=16)
    for b in (0, 31, 63):
        assert torch.equal(whole[b : b + 1], patch_normals(3, STREAM_RENOISE, 0, 4, ids[b : b + 1], patches[:1], 16))


def test_every_field_of_the_counter_changes_the_numbers():
    def draw(seed=1, stream=1, step=1, iteration=1, chain=1, patch=1):
        return patch_normals(
            seed, stream, step, iteration, torch.tensor([chain]), torch.tensor([[patch]]), 64
        ).flatten()

    draws = [draw()] + [draw(**{field: 2}) for field in ("seed", "stream", "step", "iteration", "chain", "patch")]
    draws.append(draw(seed=1 + (1 << 32)))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / math.sqrt(64)
    assert not any(torch.equal(draws[0], other) for other in draws[1:])


def test_moments_over_four_million_draws():
    patches = torch.arange(64).repeat(256, 1)
    normals = patch_normals(0, STREAM_POSTERIOR, 5, 1, torch.arange(256), patches, numel=256).double()
    n = normals.numel()
    assert n == 2**22
    assert abs(normals.mean()) < 5 / math.sqrt(n)
    assert abs(normals.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((normals**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for shift in (1, 2, 3, 4):  # neighbours within and across quads
        assert abs((normals[..., :-shift] * normals[..., shift:]).mean()) < 5 / math.sqrt(n / 2)
    assert abs((normals[:, :-1] * normals[:, 1:]).mean()) < 5 / math.sqrt(n / 2)  # patches
    assert abs((normals[:-1] * normals[1:]).mean()) < 5 / math.sqrt(n / 2)  # chains


@pytest.mark.parametrize("field", ["step", "iteration", "stream", "seed"])
def test_neighbouring_counters_are_uncorrelated_over_four_million_draws(field):
    patches, ids = torch.arange(64).repeat(256, 1), torch.arange(256)

    def draw(**change):
        counter = {"seed": 5, "stream": STREAM_RENOISE, "step": 3, "iteration": 2} | change
        return patch_normals(**counter, chain_ids=ids, patches=patches, numel=256).double()

    here, there = draw(), draw(**{field: {"seed": 6, "stream": 2, "step": 4, "iteration": 3}[field]})
    n = here.numel()
    assert n == 2**22
    assert abs((here * there).mean()) < 5 / math.sqrt(n)
    assert abs((here.square() * there.square()).mean() - 1) < 5 * math.sqrt(8 / n)


def test_keys_are_uniform_words():
    keys = patch_keys(9, STREAM_CHOICE, 3, torch.arange(4096), 64)
    assert keys.min() >= 0
    assert keys.max() < 2**32
    assert keys.double().mean().item() / 2**32 == pytest.approx(0.5, abs=5 / math.sqrt(12 * keys.numel()))


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 63, 64, 192])
def test_any_number_of_elements(numel):
    normals = patch_normals(0, 0, 0, 0, torch.arange(2), torch.arange(3).repeat(2, 1), numel)
    whole = patch_normals(0, 0, 0, 0, torch.arange(2), torch.arange(3).repeat(2, 1), 256)
    assert torch.equal(normals, whole[..., :numel])


def test_no_chains_and_no_slots():
    assert patch_normals(0, 0, 0, 0, torch.arange(0), torch.zeros(0, 3, dtype=torch.long), 8).shape == (0, 3, 8)
    assert patch_normals(0, 0, 0, 0, torch.arange(2), torch.zeros(2, 0, dtype=torch.long), 8).shape == (2, 0, 8)
