"""Where the device's time went and where the host waited, read from a trace."""

import pytest
import torch
from support import device_trace

CPU = torch.device("cpu")


def event(cat, name, ts, dur=1.0, correlation=None):
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


TRACE = [
    event("user_annotation", "ticks" + device_trace.UNTIL_DONE, 0, 100),
    event("user_annotation", "ticks", 0, 20),
    event("gpu_user_annotation", "network", 30, 60),
    event("user_annotation", "network", 2, 4),
    event("cuda_runtime", "cudaLaunchKernel", 3, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 8, correlation=2),
    event("cuda_runtime", "cudaStreamSynchronize", 9),
    event("cuda_runtime", "cudaMemcpyAsync", 10, correlation=4),
    event("cuda_runtime", "cudaGraphLaunch", 11, correlation=5),
    event("cuda_runtime", "cudaDeviceSynchronize", 25),
    event("kernel", "conv", 30, 90.0, correlation=1),
    event("kernel", "denoise_kernel", 40, 6.0, correlation=2),
    event("kernel", "nobody's", 50, 3.0),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 60, 1.0, correlation=4),
    event("kernel", "of something else", 150, 50.0, correlation=1),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_where_the_time_of_a_trace_went():
    found = device_trace.time_by_place(TRACE, "ticks", "network")
    assert found["inside_us"] == 90
    assert found["outside_us"] == {"denoise_kernel": 6, "nobody's": 3, "Memcpy DtoH (Device -> Pageable)": 1}
    assert found["outside_share"] == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="no device work"):
        device_trace.time_by_place(TRACE[:4], "ticks", "network")


def test_where_the_host_of_a_trace_waited():
    found = device_trace.waits(TRACE, "ticks")
    assert found == {
        "replays": 1,
        "waits": 2,
        "of": {"cudaStreamSynchronize": 1, "Memcpy DtoH (Device -> Pageable)": 1},
    }
    with pytest.raises(RuntimeError, match="no replay"):
        device_trace.waits(TRACE[:8], "ticks")


def test_a_recording_has_the_ranges_of_works_and_modules():
    module = torch.nn.Linear(2, 2)

    def work():
        with device_trace.marked(module, "network"):
            module(torch.ones(1, 2))
            module(torch.ones(1, 2))

    events = device_trace.record({"ticks": work, "other": lambda: module(torch.ones(1, 2))}, CPU)
    ((start, end),) = device_trace.spans(events, "ticks")
    networks = device_trace.spans(events, "network")
    assert len(networks) == 2
    assert all(start <= s < e <= end for s, e in networks)
    assert len(device_trace.spans(events, "other" + device_trace.UNTIL_DONE)) == 1
