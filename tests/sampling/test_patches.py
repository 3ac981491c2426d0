import numpy as np
import pytest
import torch

from ipr_fast import ActivePatches, PatchGrid


@pytest.mark.parametrize("shape", [(1, 16, 16, 4), (3, 8, 12, 4), (2, 6, 6, 6), (3, 5, 7, 1)])
def test_patches_and_images_are_inverse(shape):
    grid = PatchGrid(*shape)
    images = torch.randn(2, 3, *grid.sample_shape)
    patches = grid.to_patches(images)
    assert patches.shape == (2, 3, grid.num_patches, grid.patch_numel)
    assert torch.equal(grid.to_images(patches), images)


def test_patches_are_numbered_row_by_row_and_hold_channel_row_column():
    grid = PatchGrid(2, 4, 6, 2)
    images = torch.arange(48.0).reshape(1, 2, 4, 6)
    patches = grid.to_patches(images)
    for n in range(grid.num_patches):
        row, column = 2 * (n // 3), 2 * (n % 3)
        assert torch.equal(patches[0, n], images[0, :, row : row + 2, column : column + 2].flatten())


@pytest.mark.parametrize("bad", [(1, 16, 16, 5), (0, 4, 4, 2), (1, 4, 4, 0), (1, 4, 4, 2.0), (True, 4, 4, 2)])
def test_a_grid_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match=r"must"):
        PatchGrid(*bad)


def test_wrong_shapes_are_refused():
    grid = PatchGrid(1, 16, 16, 4)
    with pytest.raises(ValueError, match=r"images must be .*got \(2, 1, 16, 12\)"):
        grid.to_patches(torch.zeros(2, 1, 16, 12))
    with pytest.raises(ValueError, match=r"patches must be .*got \(2, 15, 16\)"):
        grid.to_images(torch.zeros(2, 15, 16))


def test_active_patches_list_each_chains_patches_in_order(generator):
    mask = torch.rand(50, 9, generator=generator) < torch.rand(50, 1, generator=generator)
    mask[0], mask[1] = False, True
    active = ActivePatches.from_mask(mask)
    for chain in range(50):
        ids = mask[chain].nonzero().flatten().tolist()
        assert active.index[chain].tolist() == ids + [-1] * (9 - len(ids))
        assert active.count[chain] == len(ids)


def test_gather_and_scatter_undo_each_other(generator):
    mask = torch.rand(20, 9, generator=generator) < 0.4
    active = ActivePatches.from_mask(mask, slots=int(mask.sum(1).max()))
    values = torch.randn(20, 9, 5, generator=generator)
    spread = active.scatter(active.gather(values), 9, fill=7.0)
    assert torch.equal(spread, torch.where(mask[..., None], values, 7.0))


def test_no_slots_and_no_chains_are_legal():
    assert ActivePatches.from_mask(torch.zeros(3, 4, dtype=torch.bool), slots=0).index.shape == (3, 0)
    empty = ActivePatches.from_mask(torch.zeros(0, 4, dtype=torch.bool))
    assert empty.gather(torch.zeros(0, 4, 2)).shape == (0, 4, 2)
    assert empty.scatter(torch.zeros(0, 4, 2), 4).shape == (0, 4, 2)


def test_sizes_may_be_numpys_integers():
    grid = PatchGrid(*np.array([1, 8, 12]), np.int64(4))
    assert grid == PatchGrid(1, 8, 12, 4)
    assert all(type(value) is int for value in (*grid.sample_shape, grid.patch_size))
