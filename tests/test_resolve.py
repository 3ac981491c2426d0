"""The arguments that both calls share."""

import pytest
import torch

from ipr_fast import resolve
from ipr_fast.engine import memory

CPU = torch.device("cpu")


def test_auto_takes_graphs_on_a_gpu_alone():
    assert resolve.backend_on(CPU, "auto") == "torch"
    assert resolve.backend_on(torch.device("cuda", 0), "auto") == "graphs"
    for name in ("torch", "reference"):
        assert resolve.backend_on(CPU, name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("graphs", "needs the samples on a CUDA device, got cpu"),
        ("fast", "must be one of .*got 'fast'"),
        (None, "None"),
    ],
)
def test_backends_that_cannot_run_are_refused(name, message):
    with pytest.raises(ValueError, match=f"backend .*{message}"):
        resolve.backend_on(CPU, name)


def test_chains_at_a_time():
    assert resolve.chains_at_a_time("auto") == "auto"
    assert resolve.chains_at_a_time(7) == 7


def test_more_samples_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    resolve.check_memory("batch_size", 1000, 2**19, CPU)  # 1 GB
    with pytest.raises(ValueError, match=r"batch_size: 2000 samples .* which has 1 GiB left; generate fewer per call"):
        resolve.check_memory("batch_size", 2000, 2**19, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    resolve.check_memory("batch_size", 10, 400, CPU)  # too small to ask


def test_a_bundled_model_is_loaded_once():
    assert resolve.bundled(resolve.DEFAULT_MODEL, CPU) is resolve.model_for(torch.zeros(1, 1, 32, 32))
    tokens = resolve.model_for(torch.ones(1, 81, dtype=torch.int64))
    assert tokens is resolve.bundled("token-sudoku-9x9", CPU)
    assert tokens.length == 81
    assert resolve.device_for(None, resolve.bundled(resolve.DEFAULT_MODEL, CPU)) == CPU


def test_rows_that_are_neither_images_nor_tokens_say_so():
    with pytest.raises(ValueError, match=r"int64 tokens \(B, N\), got float32 of shape \(2, 81\)"):
        resolve.model_for(torch.zeros(2, 81))
