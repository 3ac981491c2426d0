"""Ranges: none when off, and when on one for each part of the work."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ipr_fast
from ipr_fast import random_patches, trace


def test_off_a_range_is_nothing():
    assert trace.span("a") is trace.span("b")


def test_ranges_of_a_run(model, finished, monkeypatch):
    opened = []
    monkeypatch.setattr(trace, "_nvtx_range", lambda name: opened.append(name) or trace._OFF)

    def last_row(x, iteration):
        return torch.arange(16).expand(len(x), -1) >= 12

    with trace.tracing():
        ipr_fast.refine_batch(finished, last_row, 2, model=model, callback=lambda i, x: None)
    expected = {"refine_batch", "iteration", "mask_fn", "enter", "begin", "renoise", "prepare", "tick", "network"}
    expected |= {"layer_norm", "residual_norm", "partial_attention", "advance", "denoise", "leave", "callback"}
    assert set(opened) == expected
    assert opened.count("iteration") == 2
    ticks = 2 * model.refine_schedule.steps(4)
    assert opened.count("tick") == opened.count("network") == opened.count("denoise") == ticks
    opened.clear()
    ipr_fast.refine_batch(finished, last_row, 1, model=model)
    assert not opened


def test_ranges_in_the_profiler_of_torch(model, finished):
    with profile(activities=[ProfilerActivity.CPU]) as profiler, trace.tracing("torch"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model)
    names = {event.key for event in profiler.key_averages()}
    assert {"ipr_fast::refine_batch", "ipr_fast::tick", "ipr_fast::network"} <= names


def test_nvtx_takes_them(model, finished):
    pytest.importorskip("nvtx")
    with trace.tracing():
        ipr_fast.generate_batch(1, model=model)
    assert trace.span("off again") is trace._OFF


def test_what_cannot_be_had_is_said(monkeypatch):
    with pytest.raises(ValueError, match="kind must be"), trace.tracing("vtune"):
        pass
    monkeypatch.setattr(trace, "nvtx", None)
    with pytest.raises(ImportError, match="need the package nvtx"), trace.tracing():
        pass


def test_overlapping_blocks_end_with_the_last():
    outer, inner = trace.tracing("torch"), trace.tracing("torch")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert trace.span("on") is not trace._OFF
    inner.__exit__(None, None, None)
    assert trace.span("off") is trace._OFF
