import pytest
import torch
from norms import assert_near, types

from ipr_fast.kernels import residual_norm as file
from ipr_fast.kernels.launch import runs_kernel

LEVELS, PATCHES = 7, 90
SHAPES = [(1, 1, 1), (3, 4, 96), (2, 5, 33), (1, 3, 1000), (2, 81, 32)]


def modulation(batch, tokens, width, tables, slices, generator, device, dtype):
    """Scale, shift, gate and row; in another order in memory than they are read in, if they are no slices."""
    wide = torch.randn(*((LEVELS,) if tables else (batch, tokens)), 6 * width, generator=generator).to(device, dtype)
    scale, shift, gate, *_ = wide.chunk(6, dim=-1)
    row = torch.randint(0, LEVELS, (batch, tokens), generator=generator).to(device) if tables else None
    if not slices:
        scale, shift, gate = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (scale, shift, gate))
        row = row.t().contiguous().t() if tables else None
    return scale, shift, gate, row


def assert_is_the_twin(found, expected, dtype, width):
    for here, there in zip(found, expected, strict=True):
        assert_near(here, there, dtype, width)


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("slices", [True, False])
def test_gated_norm(batch, tokens, width, tables, slices, device, generator):
    for dtype in types(device):
        h, x = torch.randn(2, batch, tokens, width, generator=generator).to(device, dtype)
        given = modulation(batch, tokens, width, tables, slices, generator, device, dtype)
        scale, shift, gate, row = given
        before = [tensor.clone() for tensor in (h, x, gate)]
        found = file.gated_norm(h, gate, x, scale, shift, eps=1e-6, row=row)
        assert all(torch.equal(now, then) for now, then in zip((h, x, gate), before, strict=True))
        twin = file._gated_norm(*(each.float() for each in (h, gate, x, scale, shift)), 1e-6, row)
        assert_is_the_twin(found, twin, dtype, width)


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("slices", [True, False])
def test_embedded_norm(batch, tokens, width, tables, slices, device, generator):
    for dtype in types(device):
        x = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
        embedding = torch.randn(PATCHES, width, generator=generator).to(device, dtype)
        index = torch.randint(-1, PATCHES, (batch, tokens), generator=generator, dtype=torch.int32).to(device)
        index[0, -1] = -1
        scale, shift, _, row = modulation(batch, tokens, width, tables, slices, generator, device, dtype)
        found = file.embedded_norm(embedding, index, x, scale, shift, eps=1e-6, row=row)
        given = embedding.float(), index, *(each.float() for each in (x, scale, shift))
        assert_is_the_twin(found, file._embedded_norm(*given, 1e-6, row), dtype, width)


def test_one_row_modulates_all_tokens(device, generator):
    h, x = torch.randn(2, 3, 5, 16, generator=generator).to(device)
    scale, shift, gate = torch.randn(3, 1, 1, 16, generator=generator).to(device)
    found = file.gated_norm(h, gate, x, scale, shift, eps=1e-6)
    assert_is_the_twin(found, file._gated_norm(h, gate, x, scale, shift, 1e-6, None), torch.float32, 16)


def test_the_stream_may_be_wider_than_what_is_added(device, generator):
    """As under autocast: products in half precision, embeddings in float32."""
    x = torch.randn(3, 5, 16, generator=generator).to(device, torch.float16)
    h, embedding = torch.randn(2, 3, 5, 16, generator=generator).to(device), torch.randn(PATCHES, 16, device=device)
    scale, shift, gate = torch.randn(3, 3, 5, 16, generator=generator).to(device)
    index = torch.zeros(3, 5, dtype=torch.int32, device=device)
    twin = file._gated_norm(h[0], gate, x.float(), scale, shift, 1e-6, None)
    assert_is_the_twin(file.gated_norm(h[0], gate, x, scale, shift, eps=1e-6), twin, torch.float32, 16)
    twin = file._embedded_norm(embedding, index, x.float(), scale, shift, 1e-6, None)
    assert_is_the_twin(file.embedded_norm(embedding, index, x, scale, shift, eps=1e-6), twin, torch.float32, 16)


def test_no_tokens(device):
    table = torch.zeros(LEVELS, 8, device=device)
    for shape in ((0, 3, 8), (2, 0, 8)):
        h, row = torch.zeros(shape, device=device), torch.zeros(shape[:2], dtype=torch.int64, device=device)
        assert [each.shape for each in file.gated_norm(h, h, h, h, h, eps=1e-6)] == [shape, shape]
        found = file.embedded_norm(table, row.int(), h, table, table, eps=1e-6, row=row)
        assert [each.shape for each in found] == [shape, shape]


def test_autograd_takes_the_twin(device, generator):
    h = torch.randn(2, 3, 8, generator=generator).to(device).requires_grad_(True)
    of = h.detach()
    assert not runs_kernel(file.residual_norm_kernel, h)
    assert runs_kernel(file.residual_norm_kernel, of)
    total, normed = file.gated_norm(of, h, of, of, of, eps=1e-6)
    assert normed.requires_grad
    total.sum().backward()
    torch.testing.assert_close(h.grad, of, atol=0, rtol=0)
