"""Triton kernels against their torch twins: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `tests/kernels/test_interpreted.py` runs this folder in a
process of its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        for item in items:
            if "triton" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a launcher allocates is NaN until its kernel has written it."""

    def poisoned(make):
        def filled(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _full_precision():
    """Products in float32, not TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
