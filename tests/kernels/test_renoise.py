import pytest
import torch

from ipr_fast import ActivePatches
from ipr_fast.kernels.philox import STREAM_CHOICE, STREAM_RENOISE, patch_keys, patch_normals
from ipr_fast.kernels.renoise import choose_patches, renoise


def test_the_smallest_keys_of_the_free_patches_are_chosen(generator):
    free = torch.rand(40, 16, generator=generator) < 0.6
    free[0], free[1] = False, True
    size = (free.sum(1) * torch.rand(40, generator=generator)).long()
    iteration, ids = torch.tensor(5), torch.arange(40) * 3
    chosen = choose_patches(free, size, seed=7, iteration=iteration, chain_ids=ids)
    keys = patch_keys(7, STREAM_CHOICE, 5, ids, 16)
    for b in range(40):
        candidates = sorted((int(keys[b, n]), n) for n in range(16) if free[b, n])
        expected = {n for _, n in candidates[: int(size[b])]}
        assert set(chosen[b].nonzero().flatten().tolist()) == expected


def test_choices_are_uniform_and_fresh_every_iteration():
    free, size, ids = torch.ones(2000, 8, dtype=torch.bool), torch.full((2000,), 2), torch.arange(2000)
    masks = torch.stack(
        [choose_patches(free, size, seed=0, iteration=torch.tensor(i), chain_ids=ids) for i in range(1, 6)]
    )
    assert (masks.sum(2) == 2).all()
    n = masks[..., 0].numel()
    share = masks.float().mean((0, 1))
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5
    overlap = (masks[:-1] & masks[1:]).float().sum(2).mean()  # two of eight, twice: 8 / 16 in the mean
    assert overlap.item() == pytest.approx(0.5, abs=5 * (0.43 / (4 * 2000)) ** 0.5)


@pytest.mark.parametrize(("num_patches", "numel"), [(1, 3), (4, 16), (81, 5), (16, 64)])
def test_active_patches_become_their_noise_and_no_other_changes(num_patches, numel, generator):
    patches = torch.randn(6, num_patches, numel, generator=generator)
    mask = torch.rand(6, num_patches, generator=generator) < 0.5
    mask[0], mask[1] = False, True
    before, active, ids = patches.clone(), ActivePatches.from_mask(mask), torch.arange(6) + 100
    renoise(patches, active.index, seed=1, stream=STREAM_RENOISE, iteration=torch.tensor(9), chain_ids=ids)
    every = torch.arange(num_patches).repeat(6, 1)
    noise = patch_normals(1, STREAM_RENOISE, 0, 9, ids, every, numel)
    assert torch.equal(patches, torch.where(mask[..., None], noise, before))


def test_given_noise_takes_the_place_of_its_own(generator):
    patches = torch.randn(6, 9, 5, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    noise, before, active = torch.randn(6, 9, 5, generator=generator), patches.clone(), ActivePatches.from_mask(mask)
    counters = {"seed": 1, "stream": STREAM_RENOISE, "iteration": torch.tensor(9), "chain_ids": torch.arange(6)}
    renoise(patches, active.index, **counters, noise=active.gather(noise))
    assert torch.equal(patches, torch.where(mask[..., None], noise, before))


def test_no_slots_and_no_chains():
    for batch, slots in ((0, 3), (2, 0)):
        patches, index = torch.ones(batch, 4, 8), torch.full((batch, slots), -1, dtype=torch.int32)
        renoise(patches, index, seed=0, stream=1, iteration=torch.tensor(1), chain_ids=torch.arange(batch))
        assert (patches == 1).all()
