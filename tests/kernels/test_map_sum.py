import pytest
import torch

from ipr_fast.kernels.map_sum import map_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("with_bias", "with_map"), [(True, True), (True, False), (False, True), (False, False)])
def test_it_adds_what_is_given_in_place(dtype, with_bias, with_map, generator):
    h, g = torch.randn(2, 3, 8, 5, 7, generator=generator).to(dtype)
    h, g = (x.contiguous(memory_format=torch.channels_last) for x in (h, g))
    bias = torch.randn(8, generator=generator)
    expected = h.double()
    if with_bias:
        expected = expected + bias.double()[:, None, None]
    if with_map:
        expected = expected + g.double()
    kept = g.clone()
    found = map_sum(h, bias if with_bias else None, g if with_map else None)
    assert found is h
    assert torch.equal(g, kept)
    # Of values below 16: two roundings in float32 at least, and one to the map's type.
    rounding = 16 * (2 * 2.0**-24 + torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(found.double(), expected, atol=rounding, rtol=0)


def test_an_empty_map_is_legal():
    h = torch.zeros(0, 8, 4, 4)
    assert map_sum(h, torch.zeros(8), h.clone()).shape == h.shape
