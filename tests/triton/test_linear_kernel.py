import pytest
import torch
from torch.nn import functional as F

from ipr_fast.kernels import linear as file
from ipr_fast.kernels.launch import runs_kernel

SHAPES = [(1, 1, 1), (5, 7, 3), (130, 96, 128), (70, 64, 129), (1100, 33, 40), (2, 785, 65)]  # M, K, N


def assert_near(found, x, weight, bias, gelu):
    """Each product is off by 2**-22, each sum of 32 products and each sum of those by 2**-24 of what it adds up."""
    expected = F.linear(x.double(), weight.double(), bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    allowed = size * (2**-22 + (32 + x.shape[-1] / 16 + 4) * 2**-24)
    if gelu:  # whose slope is below 1.13
        expected, allowed = F.gelu(expected, approximate="tanh"), 1.13 * allowed + 8 * 2**-24 * expected.abs()
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("few", "many"), [(1, 1), (1, 1024), (128, 1024)])  # programs: all three sizes of tiles
def test_it_is_a_linear_layer(rows, inputs, outputs, gelu, few, many, device, generator, monkeypatch):
    monkeypatch.setattr(file, "FEW", few)
    monkeypatch.setattr(file, "MANY", many)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    found = file.linear(x, file.split(weight), bias, gelu=gelu)
    assert found.shape == (rows, outputs)
    assert found.dtype == torch.float32
    assert_near(found, x, weight, bias, gelu)


def test_rows_of_a_wider_matrix(device, generator):
    """As queries are of a projection, and as the output layer's rows are padded."""
    wide = torch.randn(3, 40, 60, generator=generator).to(device)
    x, weight = wide[..., 20:52], torch.randn(9, 32, generator=generator).to(device)
    found = file.linear(x, file.split(weight), columns=16)
    assert found.shape == (3, 40, 9)
    assert found.stride() == (640, 16, 1)
    assert_near(found, x, weight, torch.zeros(9, device=device), False)
    transposed = x.transpose(0, 1)
    scattered = x.contiguous().transpose(1, 2).contiguous().transpose(1, 2)
    for each in (transposed, scattered):
        assert_near(file.linear(each, file.split(weight)), each, weight, torch.zeros(9, device=device), False)


def test_a_bias_that_is_not_contiguous(device, generator):
    x, weight = torch.randn(5, 7, generator=generator).to(device), torch.randn(6, 7, generator=generator).to(device)
    for bias in (torch.randn(12, generator=generator).to(device)[::2], torch.ones(1, device=device).expand(6)):
        assert_near(file.linear(x, file.split(weight), bias), x, weight, bias, False)


def test_parts_that_are_not_contiguous_are_refused(device):
    with pytest.raises(ValueError, match="parts must be contiguous"):
        file.linear(torch.zeros(5, 7, device=device), torch.zeros(2, 7, 6, device=device).transpose(1, 2))


def test_no_rows(device):
    parts = torch.zeros(2, 4, 3, device=device)
    assert file.linear(torch.zeros(0, 5, 3, device=device), parts).shape == (0, 5, 4)


def test_what_is_not_finite_stays_so(device, generator):
    x = torch.randn(4, 8, generator=generator).to(device)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    x[2] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    found = file.linear(x, file.split(torch.ones(3, 8, device=device)))
    assert found.isfinite().all(1).tolist() == [False, False, False, True]


def test_large_inputs_of_gelu(device):
    x = torch.tensor([[-1e30], [-50.0], [50.0], [1e30]], device=device)
    found = file.linear(x, file.split(torch.ones(1, 1, device=device)), gelu=True)
    assert found.flatten().tolist() == [0.0, 0.0, 50.0, pytest.approx(1e30, rel=1e-6)]


def test_where_it_runs(device):
    weight = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    assert file.runs_on(weight)
    assert not file.runs_on(weight.half())
    assert not runs_kernel(file.linear_kernel, weight)
    assert not file.takes_tf32()
    assert not file.runs_on(torch.empty(0, 5, device=device))
    assert not file.runs_on(torch.empty(1, device=device).expand(file.MAX_WEIGHTS + 1))
