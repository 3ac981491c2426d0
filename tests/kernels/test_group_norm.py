import pytest
import torch

from ipr_fast.kernels.group_norm import group_norm, slab_groups

GROUPS, EPS = 4, 1e-5


def formula(h, weight, bias, cells=None):
    """In float64, as it is written; cells (B, C, H, W) already spread over the pixels."""
    h, weight, bias = h.double(), weight.double(), bias.double()
    if cells is not None:
        h = h + cells.double()
    grouped = h.unflatten(1, (GROUPS, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    variance = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((grouped - mean) / (variance + EPS).sqrt()).flatten(1, 2)
    out = normed * weight[:, None, None] + bias[:, None, None]
    return out * out.sigmoid()


def make_map(generator, batch, channels, height, width, channels_last=True):
    h = 2 * torch.randn(batch, channels, height, width, generator=generator) + 1
    weight, bias = torch.randn(2, channels, generator=generator)
    return h.to(memory_format=torch.channels_last) if channels_last else h, weight, bias


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (16, 16)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_without_rows_it_is_the_formula_and_leaves_the_map_alone(generator, height, width, channels_last):
    h, weight, bias = make_map(generator, 3, 8, height, width, channels_last)
    before = h.clone()
    found = group_norm(h, weight, bias, groups=GROUPS, eps=EPS)
    assert torch.equal(h, before)
    # Values below 8; some thirty roundings of them, those of the statistics over up to 512 terms among them.
    torch.testing.assert_close(found.double(), formula(h, weight, bias), atol=8 * 30 * 2**-24, rtol=0)


@pytest.mark.parametrize(("grid", "cell"), [((1, 1), (4, 4)), ((3, 3), (1, 1)), ((2, 3), (4, 2)), ((9, 9), (7, 7))])
@pytest.mark.parametrize("channels_last", [True, False])
def test_each_cell_adds_its_row(generator, grid, cell, channels_last):
    height, width = grid[0] * cell[0], grid[1] * cell[1]
    h, weight, bias = make_map(generator, 3, 8, height, width, channels_last)
    rows = torch.randn(7, 8, generator=generator)
    index = torch.randint(0, 7, (3, *grid), generator=generator)
    spread = rows[index].repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2).permute(0, 3, 1, 2)
    expected = formula(h, weight, bias, spread)
    found = group_norm(h, weight, bias, groups=GROUPS, eps=EPS, rows=rows, index=index)
    torch.testing.assert_close(found.double(), expected, atol=8 * 30 * 2**-24, rtol=0)
    assert found.stride() == h.stride()


def test_a_group_of_one_number_is_its_own_mean(generator):
    h, weight, bias = make_map(generator, 1, GROUPS, 1, 1)
    found = group_norm(h, weight, bias, groups=GROUPS, eps=EPS)
    # x - x may be rounded before it is divided by sqrt(eps).
    tolerance = 4 * 8 * 2**-24 / EPS**0.5
    torch.testing.assert_close(found.flatten(), torch.nn.functional.silu(bias), atol=tolerance, rtol=0)


@pytest.mark.parametrize("split", [1, 5, 7])
def test_two_maps_are_one_and_a_shift_is_added_to_it(generator, split):
    h, weight, bias = make_map(generator, 3, 8, 3, 5)
    shift, before = torch.randn(8, generator=generator), h.clone()
    found = group_norm(h[:, :split], weight, bias, groups=GROUPS, eps=EPS, other=h[:, split:], shift=shift)
    expected = formula(h, weight, bias, shift[:, None, None].expand_as(h))
    torch.testing.assert_close(found.double(), expected, atol=8 * 30 * 2**-24, rtol=0)
    assert torch.equal(h, before)


def test_a_slab_fills_a_line_and_is_read_at_once_where_it_fits():
    """(pixels, channels a group, bytes of a number): groups together, and whether a program reads them at once."""
    found = {
        (1024, 2, 4): (8, True),  # half a line, as more do not fit into a program's registers
        (1024, 24, 4): (1, False),
        (64, 16, 4): (2, True),
        (252 * 252, 4, 4): (8, False),
        (252 * 252, 4, 2): (16, False),
        (126 * 126, 6, 4): (4, False),  # five fit, but would end within a sector
        (2**20, 64, 4): (1, False),
        (1, 1, 4): (32, True),
        (4, 3, 2): (16, True),
    }
    assert {case: slab_groups(case[0], 32, *case[1:]) for case in found} == found


def test_an_empty_batch_is_legal():
    h, index = torch.zeros(0, 8, 4, 4), torch.zeros(0, 2, 2, dtype=torch.int64)
    found = group_norm(h, torch.ones(8), torch.zeros(8), groups=GROUPS, eps=EPS, rows=torch.zeros(1, 8), index=index)
    assert found.shape == h.shape
