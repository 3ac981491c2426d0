"""Fixtures: a small model, chains, and a tape that stands in for CUDA graphs."""

import signal

import pytest
import torch
from small_models import TINY, randomise
from tape import Tape

import ipr_fast
from ipr_fast import resolve
from ipr_fast.engine.graph_cache import drop_kept
from ipr_fast.models import PatchTransformer, packed

# A shell starts background jobs with Ctrl-C ignored; tests of interrupts need it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On tensors as small as the tests' a second thread gains nothing, and beside another busy process the two spin.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> PatchTransformer:
    """A small model of 16 patches; its random weights make outputs depend on every input."""
    return randomise(PatchTransformer(TINY), seed=0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture
def ragged_known(generator) -> torch.Tensor:
    """(12, 16) bool: every number of clues from none to all, in one batch."""
    number = torch.tensor([0, 16, 15, 1, 2, 3, 5, 7, 8, 10, 12, 14])[:, None]
    return torch.rand(12, 16, generator=generator).argsort(1).argsort(1) < number


@pytest.fixture
def finished(generator) -> torch.Tensor:
    """(12, 1, 16, 16) images."""
    return torch.randn(12, 1, 16, 16, generator=generator).clamp(-1, 1)


@pytest.fixture
def tape(monkeypatch):
    """A tape on which every call captures."""
    tape = Tape()
    monkeypatch.setattr(resolve, "CudaCapture", lambda device: tape)
    monkeypatch.setattr(packed, "_can_be_packed", lambda layer: False)  # as on the GPU that it stands for
    monkeypatch.setattr(resolve, "backend_on", lambda device, name: "graphs" if name == "auto" else name)
    drop_kept()
    yield tape
    drop_kept()


@pytest.fixture(params=["torch", "reference", "graphs"])
def backend(request):
    """Each backend in turn; "graphs" on the tape that stands for a GPU."""
    if request.param == "graphs":
        request.getfixturevalue("tape")
        return "auto"
    return request.param


@pytest.fixture
def run(backend, finished):
    """Refines `finished`, by each backend in turn."""

    def refine(model, policy=None, **options):
        policy = ipr_fast.random_patches(0.5) if policy is None else policy
        options = {"iters": 2, "schedule": ipr_fast.Schedule(2, 0.5), **options}
        return ipr_fast.refine_batch(finished, policy, model=model, backend=backend, **options)

    return refine
