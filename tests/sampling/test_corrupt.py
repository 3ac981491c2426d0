import pytest
import torch

from ipr_fast import PatchGrid, all_patches, refine_batch, swap_patches
from ipr_fast.kernels.renoise import PatchChoice, choose_patches

GRID = PatchGrid(1, 16, 16, 4)


def moved(x, swapped):
    return (GRID.to_patches(x) != GRID.to_patches(swapped)).any(2)


@pytest.mark.parametrize("pairs", [0, 1, 3, 8])
def test_pairs_of_patches_change_places(finished, pairs):
    before = finished.clone()
    swapped = swap_patches(finished, pairs, 4)
    assert torch.equal(finished, before)
    assert moved(finished, swapped).sum(1).tolist() == [2 * pairs] * 12
    for chain in range(12):
        patches, other = GRID.to_patches(finished)[chain], GRID.to_patches(swapped)[chain]
        places = [int((patches == patch).all(1).nonzero()) for patch in other]  # where each patch was before
        assert sorted(places) == list(range(16))
        assert all(places[place] == n for n, place in enumerate(places))  # a pair, each in the other's place


def test_known_patches_stay(finished):
    known = torch.zeros(12, 4, 4, dtype=torch.bool)
    known[:, :2] = True
    swapped = swap_patches(finished, 4, 4, known=known)
    assert torch.equal(moved(finished, swapped), ~known.flatten(1))


def test_the_choice_is_the_chains_own_and_uniform(finished):
    ids = torch.arange(12)
    whole = swap_patches(finished, 2, 4, seed=5, chain_ids=ids)
    part = swap_patches(finished[3:7], 2, 4, seed=5, chain_ids=ids[3:7])
    assert torch.equal(whole[3:7], part)
    assert not torch.equal(whole, swap_patches(finished, 2, 4, seed=6, chain_ids=ids))
    many = torch.arange(16.0).view(1, 16, 1).expand(4000, 16, 16)
    x = GRID.to_images(many)
    share = moved(x, swap_patches(x, 2, 4)).float().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_pairs_are_uniform_and_independent_of_refinements_choices():
    x = GRID.to_images(torch.arange(16.0).view(1, 16, 1).expand(6000, 16, 16))
    swapped = GRID.to_patches(swap_patches(x, 2, 4))[..., 0].long()
    partner = torch.zeros(16, 16)
    for n in range(16):
        partner[n] = torch.bincount(swapped[:, n], minlength=16)
    expected = 6000 * 4 / 16 / 15  # each patch is moved in a quarter of the samples, to every other place equally often
    off = partner[~torch.eye(16, dtype=torch.bool)]
    assert (off - expected).abs().max() < 5 * expected**0.5
    swap = moved(x, swap_patches(x, 2, 4))
    for stream_iteration in (0, 1):
        free, size = torch.ones(6000, 16, dtype=torch.bool), torch.full((6000,), 4)
        choice = PatchChoice(free, size, torch.tensor(stream_iteration))
        renoised = choose_patches(choice, seed=0, chain_ids=torch.arange(6000))
        both = (swap & renoised).sum(1).float()  # four of sixteen, twice: mean 1, variance 9/16 * 16/15
        assert both.mean().item() == pytest.approx(1, abs=5 * (0.6 / 6000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_keeps_the_dtype_and_can_be_refined(model, finished, dtype):
    swapped = swap_patches(finished.to(dtype), 2, 4)
    assert swapped.dtype == dtype
    assert refine_batch(swapped, all_patches(), 1, model=model).isfinite().all()


@pytest.mark.parametrize(("shape", "size"), [((2, 12), 3), ((1, 8, 6), (2, 3)), ((1, 4, 4, 6), (1, 2, 3))])
def test_patches_of_any_grid_are_swapped(shape, size, generator):
    grid, x = PatchGrid.of(shape, size), torch.randn(5, *shape, generator=generator)
    known = torch.zeros(5, *grid.grid_shape, dtype=torch.bool)
    known[:, 0] = True
    swapped = swap_patches(x, 1, size, known=known)
    before, after = grid.to_patches(x), grid.to_patches(swapped)
    changed = (before != after).any(-1)
    assert torch.equal(changed.sum(1), torch.full((5,), 2))
    assert not (changed & known.flatten(1)).any()
    assert torch.equal(before[..., 0].sort(1).values, after[..., 0].sort(1).values)


def test_an_empty_batch_is_legal():
    assert swap_patches(torch.zeros(0, 1, 16, 16), 3, 4).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 9}, "pairs must be at most 8, half the free patches of every sample, got 9"),
        ({"pairs": -1}, "pairs must be an int >= 0"),
        ({"pairs": 1.0}, "pairs must be an int >= 0"),
        ({"patch_size": 5}, "patch_size must divide"),
        ({"patch_size": 0}, "patch_size must be an int >= 1"),
        ({"x": torch.zeros(2, 16)}, r"x must be \(B, C, L\), images \(B, C, H, W\) or video"),
        ({"known": torch.zeros(12, 5, dtype=torch.bool)}, "known must have shape"),
        ({"seed": -1}, "seed must be an int"),
        ({"chain_ids": torch.zeros(3)}, "chain_ids must be an int64 tensor"),
    ],
)
def test_bad_input_is_named(finished, arguments, message):
    with pytest.raises(ValueError, match=message):
        swap_patches(**{"x": finished, "pairs": 1, "patch_size": 4} | arguments)
