import pixel_formulas
import pytest
import torch

from ipr_fast.kernels.pixel_head import bytes_moved, pixel_head, sizes

SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 16, 16), (3, 1, 4, 6, 7)]  # batch, patches, channels, pixels, hidden units
FLOOR = 0.05


def make_case(batch, count, channels, pixels, hidden, generator, **of):
    """Rows of weights with a number more than needed."""
    weights = torch.randn(batch, count, sum(sizes(channels, hidden)) + 1, generator=generator, **of)
    z = torch.randn(batch, count, channels * pixels, generator=generator, **of)
    level = torch.rand(batch, count, generator=generator, **of)
    level[:, 0] = 0
    return weights, z, level


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape, generator):
    case, options = make_case(*shape, generator), {"channels": shape[2], "hidden": shape[4], "floor": FLOOR}
    before = [each.clone() for each in case]
    found = pixel_head(*case, **options)
    for field, *expected in zip(found, *pixel_formulas.head(*case, **options), strict=True):
        pixel_formulas.assert_within(field, *expected)
    assert all(torch.equal(*pair) for pair in zip(case, before, strict=True))


def test_no_patches():
    for shape in ((0, 3), (2, 0)):
        case = torch.zeros(*shape, sum(sizes(3, 4))), torch.zeros(*shape, 12), torch.zeros(shape)
        assert [each.shape for each in pixel_head(*case, channels=3, hidden=4, floor=FLOOR)] == [(*shape, 12)] * 2


def test_it_has_a_derivative(generator):
    weights, z, level = make_case(2, 2, 2, 3, 3, generator, dtype=torch.float64)

    def of(weights, z):
        return pixel_head(weights, z, level, channels=2, hidden=3, floor=FLOOR)

    assert torch.autograd.gradcheck(of, [weights.requires_grad_(True), z.requires_grad_(True)])


def test_bytes():
    weights, z = torch.zeros(3, 4, sum(sizes(3, 16)), dtype=torch.float16), torch.zeros(3, 4, 48)
    written = z.nbytes + z.half().nbytes
    assert bytes_moved(3, 4, 48, 3, 16, 4, 2) == weights.nbytes + z.nbytes + 4 * 3 * 4 + written
