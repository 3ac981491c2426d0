"""PyTorch's attention is called in one place, and on a GPU without cuDNN's."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ipr_fast.kernels.scaled_attention import scaled_attention

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_calls_attention_in_one_place_only():
    calls = {
        path.relative_to(ROOT).as_posix()
        for folder in ("ipr_fast", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "scaled_dot_product_attention"
    }
    assert calls == {"kernels/scaled_attention.py"}


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_cudnn_is_off_for_the_call_only(monkeypatch, allowed):
    seen = []

    def attention(q, k, v, attn_mask):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(), attn_mask))
        if attn_mask == "wrong":
            raise RuntimeError(attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    on_gpu, cuda = SimpleNamespace(is_cuda=True), torch.backends.cuda
    before = cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()
    try:
        cuda.enable_cudnn_sdp(allowed)
        cuda.enable_flash_sdp(False)
        scaled_attention(on_gpu, on_gpu, on_gpu, "mask")
        with pytest.raises(RuntimeError, match="wrong"):
            scaled_attention(on_gpu, on_gpu, on_gpu, "wrong")
        assert seen == [(False, False, "mask"), (False, False, "wrong")]
        assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()) == (allowed, False)
    finally:
        cuda.enable_cudnn_sdp(before[0])
        cuda.enable_flash_sdp(before[1])


def test_elsewhere_it_is_torchs(generator):
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=generator)
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(scaled_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=0, rtol=0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(scaled_attention(q, k, v, mask), expected, atol=0, rtol=0)
