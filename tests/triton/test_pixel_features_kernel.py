import pixel_formulas
import pytest
import torch

from ipr_fast.kernels import pixel_features as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1, 1, 1), (2, 21, 3, 16, 32), (3, 4, 5, 6, 40), (1, 2, 1, 49, 3)]


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


@pytest.mark.parametrize(("batch", "count", "channels", "pixels", "features"), SHAPES)
@pytest.mark.parametrize("slices", [True, False])
def test_pixel_features(batch, count, channels, pixels, features, slices, device, generator):
    for dtype in types(device):
        weight = torch.randn(features, channels, generator=generator).to(device, dtype)
        bias = torch.randn(features, generator=generator).to(device, dtype)
        z = torch.randn(batch, count, channels * pixels + 3, generator=generator).to(device)[..., 1:-2]
        z = z if slices else z.contiguous()
        found = file.pixel_features(z, weight, bias)
        assert found.dtype == dtype
        pixel_formulas.assert_within(found, *pixel_formulas.features(z, weight, bias))


def test_large_sums_saturate(device):
    """tanh by an exponential, which overflows."""
    z = torch.tensor([[[200.0, -200.0]]], device=device)
    weight, bias = torch.tensor([[1.0], [3e4]], device=device), torch.zeros(2, device=device)
    assert file.pixel_features(z, weight, bias).abs().max() == 0
    assert torch.equal(file.pixel_features(z.abs(), weight, bias), torch.ones(1, 1, 2, device=device))


def test_no_patches(device):
    for shape in ((0, 3, 12), (2, 0, 12)):
        z, weight = torch.zeros(shape, device=device), torch.zeros(5, 3, device=device)
        assert file.pixel_features(z, weight, weight[:, 0]).shape == (*shape[:2], 5)


def test_autograd_takes_the_twin(device):
    weight = torch.zeros(5, 3, device=device, requires_grad=True)
    assert not runs_kernel(file.pixel_features_kernel, weight)
    assert runs_kernel(file.pixel_features_kernel, weight.detach())
