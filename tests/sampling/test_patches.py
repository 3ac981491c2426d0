import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipr_fast import ActivePatches, PatchGrid

SPATIAL = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3)  # (patches, size of one)


@settings(max_examples=100, deadline=None)
@given(channels=st.integers(1, 3), spatial=SPATIAL, lead=st.lists(st.integers(0, 3), max_size=2))
def test_patches_of_any_grid_hold_channel_and_position(channels, spatial, lead):
    grid_shape, patch_shape = zip(*spatial, strict=True)
    grid = PatchGrid.of((channels, *(count * size for count, size in spatial)), patch_shape)
    assert grid.grid_shape == grid_shape
    assert (grid.num_patches, grid.patch_numel) == (math.prod(grid_shape), channels * math.prod(patch_shape))
    samples = torch.randn(*lead, *grid.sample_shape, generator=torch.Generator().manual_seed(0))
    patches = grid.to_patches(samples)
    assert patches.shape == (*lead, grid.num_patches, grid.patch_numel)
    assert torch.equal(grid.to_images(patches), samples)
    for n, place in enumerate(product(*map(range, grid_shape))):  # the last dimension fastest
        cut = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, patch_shape, strict=True))
        assert torch.equal(patches[..., n, :], samples[(..., slice(None), *cut)].flatten(len(lead)))


@pytest.mark.parametrize("size", [4, (4, 4)])
def test_a_grid_of_images_is_the_same_by_both_names(size):
    grid = PatchGrid(3, 8, 12, size)
    assert (
        grid == PatchGrid.of((3, 8, 12), size) == PatchGrid.of([3, 8, 12], [4, 4]) == pickle.loads(pickle.dumps(grid))
    )
    assert len({grid, PatchGrid.of(torch.Size((3, 8, 12)), (4, 4))}) == 1
    assert (grid.channels, grid.height, grid.width, grid.patch_size, grid.grid_h, grid.grid_w) == (3, 8, 12, 4, 2, 3)
    assert repr(grid) == "PatchGrid.of((3, 8, 12), (4, 4))"


def test_patches_need_not_be_square():
    grid = PatchGrid(1, 4, 6, (2, 3))
    patches = grid.to_patches(torch.arange(24.0).view(1, 4, 6))
    assert patches[3].tolist() == [15, 16, 17, 21, 22, 23]
    with pytest.raises(ValueError, match=r"^patch_size: the sizes of patches \(2, 3\) differ; use patch_shape"):
        _ = grid.patch_size


@pytest.mark.parametrize("name", ["height", "width", "grid_h", "grid_w"])
@pytest.mark.parametrize("shape", [(1, 8), (1, 4, 4, 4)])
def test_what_only_images_have_is_refused_by_name(name, shape):
    with pytest.raises(ValueError, match=rf"^{name}: samples .* are not images \(C, H, W\); see grid_shape"):
        getattr(PatchGrid.of(shape, 4), name)


@pytest.mark.parametrize(
    ("sample_shape", "patch_shape", "message"),
    [
        ((8,), (), r"^sample_shape must be \(C, L\), \(C, H, W\) or \(C, T, H, W\), got \(8,\)"),
        ((1, 2, 2, 2, 2), 1, "^sample_shape must be "),
        (8, 1, "^sample_shape must be a sequence of ints >= 1, got 8"),
        ((1, 0), 1, "^sample_shape: each size must be an int >= 1, got 0"),
        ((1, 8), (4, 4), r"^patch_shape must be an int or 1 of them, for samples of 8, got \(4, 4\)"),
        ((1, 8, 8), (4, 3), r"^patch_shape must divide the spatial sizes 8 x 8 of samples, got \(4, 3\)"),
        ((1, 6, 8, 8), 4, "^patch_shape must divide the spatial sizes 6 x 8 x 8 of samples, got 4"),
        ((1, 8), 2.0, "^patch_shape must be an int >= 1, got 2.0"),
    ],
)
def test_a_shape_that_cannot_be_is_named(sample_shape, patch_shape, message):
    with pytest.raises(ValueError, match=message):
        PatchGrid.of(sample_shape, patch_shape)


def test_samples_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"^samples must be \(\.\.\., 2, 8\), got \(8,\)"):
        PatchGrid.of((2, 8), 4).to_patches(torch.zeros(8))


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
