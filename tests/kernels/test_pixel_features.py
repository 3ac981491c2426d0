import pixel_formulas
import pytest
import torch

from ipr_fast.kernels.pixel_features import bytes_moved, pixel_features

SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 16, 32), (3, 1, 4, 6, 7)]  # batch, patches, channels, pixels, features


@pytest.mark.parametrize(("batch", "count", "channels", "pixels", "features"), SHAPES)
def test_the_formula(batch, count, channels, pixels, features, generator):
    z = torch.randn(batch, count, channels * pixels, generator=generator)
    weight = torch.randn(features, channels, generator=generator)
    bias = torch.randn(features, generator=generator)
    before = z.clone()
    pixel_formulas.assert_within(pixel_features(z, weight, bias), *pixel_formulas.features(z, weight, bias))
    assert torch.equal(z, before)


def test_no_patches():
    for shape in ((0, 3, 12), (2, 0, 12)):
        assert pixel_features(torch.zeros(shape), torch.zeros(5, 3), torch.zeros(5)).shape == (*shape[:2], 5)


def test_it_has_a_derivative(generator):
    of = {"generator": generator, "dtype": torch.float64}
    given = [torch.randn(2, 3, 8, **of), torch.randn(5, 2, **of), torch.randn(5, **of)]
    assert torch.autograd.gradcheck(pixel_features, [each.requires_grad_(True) for each in given])


def test_bytes():
    z, out = torch.zeros(3, 4, 48), torch.zeros(3, 4, 32, dtype=torch.float16)
    assert bytes_moved(3, 4, 48, 32, 4, 2) == z.nbytes + out.nbytes
