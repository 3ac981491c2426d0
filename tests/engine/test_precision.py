"""TF32 is a switch of the process: threads share a setting or wait for it, and it is restored afterwards."""

import threading
from contextlib import suppress

import pytest
import torch

from ipr_fast.engine.precision import float32_products

GPU = torch.device("cuda")  # whose switches a machine without one has as well


def switches():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _as_before():
    before = switches()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [False, True])
def test_the_switches_are_set_and_put_back(before, cudnn):
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = cudnn
    for tf32, within in ((False, ("highest", False)), (True, ("high", True))):
        with suppress(KeyError), float32_products(GPU, tf32):
            assert switches() == within
            raise KeyError
        assert switches() == (before, cudnn)
    with float32_products(torch.device("cpu"), True):
        assert switches() == (before, cudnn)


def test_one_thread_cannot_want_both():
    with float32_products(GPU, True), pytest.raises(RuntimeError, match="tf32=False within"):
        float32_products(GPU, False).__enter__()
    with float32_products(GPU, False), float32_products(GPU, False):
        assert switches() == ("highest", False)


def test_what_the_user_sets_afterwards_can_be_read():
    torch.backends.cuda.matmul.allow_tf32 = True
    with float32_products(GPU, False):
        pass
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.get_float32_matmul_precision() == "highest"


def test_overlapping_blocks_of_two_threads():
    torch.set_float32_matmul_precision("high")
    inside, release, seen = threading.Event(), threading.Event(), []

    def other(tf32):
        with float32_products(GPU, tf32):
            seen.append((tf32, switches()))
            inside.set()
            release.wait(10)
            seen.append((tf32, switches()))

    first = float32_products(GPU, False)
    first.__enter__()
    same, differing = (threading.Thread(target=other, args=(tf32,)) for tf32 in (False, True))
    same.start()
    assert inside.wait(10)
    differing.start()
    first.__exit__(None, None, None)
    assert switches() == ("highest", False)  # the other one is still inside
    release.set()
    same.join(10)
    differing.join(10)
    assert seen[:2] == [(False, ("highest", False))] * 2
    assert seen[2:] == [(True, ("high", True))] * 2
    assert switches()[0] == "high"
