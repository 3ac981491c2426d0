"""Triton kernels against their torch twins: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `tests/kernels/test_interpreted.py` runs this folder in a
process of its own.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


def release(package):
    """Return (major, minor) of a package's version, (0, 0) where it is not installed."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return 0, 0


def pytest_configure():
    if INTERPRETED and (0, 0) < release("triton") < (3, 7) and release("numpy") >= (2, 4):
        raise pytest.UsageError(
            f"the interpreter of Triton {version('triton')} takes numpy < 2.4, got numpy {version('numpy')}"
        )


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
