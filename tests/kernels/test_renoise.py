import pytest
import torch

from ipr_fast.kernels.philox import STREAM_CHOICE, STREAM_RENOISE, patch_keys, patch_normals, seed_tensor
from ipr_fast.kernels.renoise import PatchChoice, Slots, choose_patches, renoise


def make_slots(batch, slots):
    """Poisoned, so that what is not written shows."""
    integers = [torch.full(shape, -99, dtype=torch.int32) for shape in ((batch, slots), (batch,), (batch, slots))]
    level, step = torch.full((batch, slots), float("nan")), torch.full((batch,), -99)
    return Slots(integers[0], integers[1], level, integers[2], step)


def counters(batch, iteration=9, seed=1):
    ids = torch.arange(batch) + 100
    return {
        "seed": seed_tensor(seed, "cpu"),
        "stream": STREAM_RENOISE,
        "iteration": torch.tensor(iteration),
        "chain_ids": ids,
    }


def test_the_smallest_keys_of_the_free_patches_are_chosen(generator):
    free = torch.rand(40, 16, generator=generator) < 0.6
    free[0], free[1] = False, True
    size = (free.sum(1) * torch.rand(40, generator=generator)).long()
    ids = torch.arange(40) * 3
    chosen = choose_patches(PatchChoice(free, size, torch.tensor(5)), seed=7, chain_ids=ids)
    keys = patch_keys(7, STREAM_CHOICE, 5, ids, 16)
    for b in range(40):
        candidates = sorted((int(keys[b, n]), n) for n in range(16) if free[b, n])
        expected = {n for _, n in candidates[: int(size[b])]}
        assert set(chosen[b].nonzero().flatten().tolist()) == expected


def test_choices_are_uniform_and_fresh_every_iteration():
    free, size, ids = torch.ones(2000, 8, dtype=torch.bool), torch.full((2000,), 2), torch.arange(2000)
    masks = torch.stack(
        [choose_patches(PatchChoice(free, size, torch.tensor(i)), seed=0, chain_ids=ids) for i in range(1, 6)]
    )
    assert (masks.sum(2) == 2).all()
    n = masks[..., 0].numel()
    share = masks.float().mean((0, 1))
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5
    overlap = (masks[:-1] & masks[1:]).float().sum(2).mean()  # two of eight, twice: 8 / 16 in the mean
    assert overlap.item() == pytest.approx(0.5, abs=5 * (0.43 / (4 * 2000)) ** 0.5)


@pytest.mark.parametrize(("num_patches", "numel"), [(1, 3), (4, 16), (81, 5), (16, 64)])
@pytest.mark.parametrize("spare", [0, 2])
def test_active_patches_become_their_noise_and_no_other_changes(num_patches, numel, spare, generator):
    patches = torch.randn(6, num_patches, numel, generator=generator)
    mask = torch.rand(6, num_patches, generator=generator) < 0.5
    mask[0], mask[1] = False, True
    before, slots, options = patches.clone(), make_slots(6, num_patches + spare), counters(6)
    renoise(patches, mask, slots, **options)
    every = torch.arange(num_patches).repeat(6, 1)
    noise = patch_normals(1, STREAM_RENOISE, 0, 9, options["chain_ids"], every, numel)
    assert torch.equal(patches, torch.where(mask[..., None], noise, before))
    for b in range(6):
        ids = mask[b].nonzero().flatten().tolist()
        padding = num_patches + spare - len(ids)
        assert slots.index[b].tolist() == ids + [-1] * padding
        assert slots.level[b].tolist() == [1.0] * len(ids) + [0.0] * padding
    assert slots.count.tolist() == mask.sum(1).tolist()
    assert (slots.start == -1).all()
    assert (slots.step == -1).all()


def test_a_choice_is_made_and_written_into_the_mask(generator):
    patches = torch.randn(6, 9, 5, generator=generator)
    free = torch.rand(6, 9, generator=generator) < 0.7
    choice = PatchChoice(free, (free.sum(1) // 2), torch.tensor(4))
    options = counters(6)
    expected = choose_patches(choice, seed=1, chain_ids=options["chain_ids"])
    runs = []
    for mask, given in ((torch.ones(6, 9, dtype=torch.bool), choice), (expected.clone(), None)):
        z, slots = patches.clone(), make_slots(6, 5)
        renoise(z, mask, slots, **options, choice=given)
        assert torch.equal(mask, expected)
        runs.append((z, *vars(slots).values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_given_noise_takes_the_place_of_its_own(generator):
    patches = torch.randn(6, 9, 5, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    noise, before = torch.randn(6, 9, 5, generator=generator), patches.clone()
    renoise(patches, mask, make_slots(6, 9), **counters(6), noise=noise)
    assert torch.equal(patches, torch.where(mask[..., None], noise, before))


def test_no_slots_and_no_chains():
    for batch, slots in ((0, 3), (2, 0)):
        patches = torch.ones(batch, 4, 8)
        renoise(patches, torch.zeros(batch, 4, dtype=torch.bool), make_slots(batch, slots), **counters(batch))
        assert (patches == 1).all()
