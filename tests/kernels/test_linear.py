"""The twin of linear layers, its split of weights, and the choice of tiles."""

import pytest
import torch

from ipr_fast.kernels import linear as file


def test_the_parts_of_a_weight_are_its_sum_and_numbers_of_tf32(generator):
    weight = torch.randn(33, 20, generator=generator) * 10.0 ** torch.arange(-10, 10)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1 + 2**-11, -1 - 2**-11])
    big, small = file.split(weight)
    assert torch.equal(big + small, weight)
    assert (big.view(torch.int32) & (1 << 13) - 1).eq(0).all()
    assert (small.abs() <= big.abs() * 2**-11).all()


def test_a_transposed_weight_is_split_in_its_order(generator):
    weight = torch.randn(5, 3, generator=generator).t()
    assert torch.equal(file.split(weight).sum(0), weight)


def test_parts_are_overwritten_in_place(generator):
    first, second = torch.randn(2, 4, 3, generator=generator)
    parts = file.split(first)
    assert file.split(second, parts) is parts
    assert torch.equal(parts, file.split(second))


def test_parts_of_another_shape_are_not_written_to(generator):
    parts = torch.zeros(2, 8, 20)
    found = file.split(torch.randn(1, 20, generator=generator), parts)
    assert found.shape == (2, 1, 20)
    assert not parts.any()


@pytest.mark.parametrize(("columns", "width"), [(20, None), (10, 7)])
def test_sizes_that_do_not_fit_are_refused(columns, width):
    with pytest.raises(ValueError, match=r"x must have 10 columns and the result at least 8, got \(3, \d+\) and \d"):
        file.linear(torch.zeros(3, columns), torch.zeros(2, 8, 10), columns=width)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_twin_is_the_formula(gelu, bias, generator):
    x, weight = torch.randn(2, 7, 33, generator=generator), torch.randn(5, 33, generator=generator)
    b = torch.randn(5, generator=generator) if bias else None
    found = file.linear(x, file.split(weight), b, gelu=gelu)
    expected = torch.einsum("...k,nk->...n", x.double(), weight.double()) + (b.double() if bias else 0.0)
    if gelu:
        u = (2 / torch.pi) ** 0.5 * (expected + 0.044715 * expected**3)
        expected = 0.5 * expected * (1 + torch.tanh(u))
    # Sums of 33 products below 16 in magnitude, in float32, and GELU's few roundings.
    torch.testing.assert_close(found.double(), expected, atol=16 * (33 + 10) * 2**-24, rtol=0)


def test_few_rows_take_small_tiles():
    sizes = [tuple(file.tile(rows, 256, 96).values())[:3] for rows in (1, 1984, 1985, 16_320, 16_321)]
    assert sizes == [(16, 32, 64), (16, 32, 64), (64, 64, 32), (64, 64, 32), (64, 128, 32)]
    assert tuple(file.tile(100_000, 200, 96).values())[:3] == (64, 64, 32)
    assert tuple(file.tile(100_000, 256, 784).values())[:3] == (64, 64, 16)


def test_bytes():
    x, parts, out = torch.zeros(7, 5), torch.zeros(2, 3, 5), torch.zeros(7, 3)
    assert file.bytes_moved(7, 3, 5) == x.nbytes + parts.nbytes + out.nbytes
