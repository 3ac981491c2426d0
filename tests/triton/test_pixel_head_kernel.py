import pixel_formulas
import pytest
import torch

from ipr_fast.kernels import pixel_head as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1, 1, 1), (2, 21, 3, 16, 16), (3, 4, 5, 6, 3), (1, 2, 1, 70, 2)]
FLOOR = 0.05


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slices", [True, False])
def test_pixel_head(shape, slices, device, generator):
    batch, count, channels, pixels, hidden = shape
    options = {"channels": channels, "hidden": hidden, "floor": FLOOR}
    for dtype in types(device):
        used = sum(file.sizes(channels, hidden))
        weights = torch.randn(batch, count, used + 1, generator=generator).to(device, dtype)
        z = torch.randn(batch, count, channels * pixels + 3, generator=generator).to(device)[..., 1:-2]
        level = torch.rand(batch, count, generator=generator).to(device)
        level[:, 0] = 0
        if not slices:
            weights, z, level = weights[..., :used].contiguous(), z.contiguous(), level.t().contiguous().t()
        before = [each.clone() for each in (weights, z, level)]
        found = file.pixel_head(weights, z, level, **options)
        assert [each.dtype for each in found] == [torch.float32, dtype]
        for field, *expected in zip(found, *pixel_formulas.head(weights, z, level, **options), strict=True):
            pixel_formulas.assert_within(field, *expected)
        assert all(torch.equal(*pair) for pair in zip((weights, z, level), before, strict=True))


def test_large_sums_saturate(device):
    """One unit of weight 1e4: tanh by an exponential, which overflows."""
    z = torch.tensor([[[200.0, -200.0]]], device=device)
    weights = torch.tensor([1e4, 0.0, 0.0, 2.0, 900.0, 0.0, 0.0], device=device).expand(1, 1, 7)
    velocity, mix = file.pixel_head(weights, z, torch.ones(1, 1, device=device), channels=1, hidden=1, floor=FLOOR)
    assert velocity.flatten().tolist() == [198.0, -198.0]
    assert mix.flatten().tolist() == [1.0, 0.0]


def test_no_patches(device):
    for shape in ((0, 3), (2, 0)):
        case = [torch.zeros(*shape, n, device=device) for n in (sum(file.sizes(3, 4)), 12)]
        found = file.pixel_head(*case, torch.zeros(shape, device=device), channels=3, hidden=4, floor=FLOOR)
        assert [each.shape for each in found] == [(*shape, 12)] * 2


def test_autograd_takes_the_twin(device):
    weights = torch.zeros(1, 1, 7, device=device, requires_grad=True)
    assert not runs_kernel(file.pixel_head_kernel, weights)
    assert runs_kernel(file.pixel_head_kernel, weights.detach())
