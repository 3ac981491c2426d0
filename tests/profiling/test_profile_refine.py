"""The table and the trace of a profile: what adds up to what, and what an operator counts as."""

import contextlib
import gzip
import io
import json
import math
import re

import profile_refine
import pytest
from where_time_goes import (
    ATTENTION,
    BETWEEN,
    MOVING,
    NORMS,
    NUMBERS,
    OTHER,
    OUTSIDE,
    OWN,
    PRODUCTS,
    VIEWS,
    kind_of,
    split,
)

import ipr_fast

SMALL = ["--chains", "2", "--iters", "1", "--steps", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", PRODUCTS),
        ("aten::add", MOVING),
        ("aten::add_", MOVING),
        ("aten::addcmul", MOVING),
        ("aten::mkldnn_convolution", PRODUCTS),
        ("mkldnn::_linear_pointwise", PRODUCTS),
        ("mkldnn::_convolution_pointwise", PRODUCTS),
        ("mkldnn::_convolution_pointwise_", PRODUCTS),
        ("aten::conv_transpose2d", PRODUCTS),
        ("mkldnn::_reorder_linear_weight", MOVING),
        ("mkldnn::_reorder_convolution_weight", MOVING),
        ("mkldnn::unheard_of", OTHER),
        ("aten::gelu_", NORMS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::native_layer_norm", NORMS),
        ("aten::silu_", NORMS),
        ("aten::bitwise_xor_", NUMBERS),
        ("aten::__rshift__", NUMBERS),
        ("aten::index_copy_", MOVING),
        ("aten::view", VIEWS),
        ("aten::copy_of_gemm", OTHER),
        ("", BETWEEN),
        ("denoise_kernel", OWN),
        ("partial_attention_kernel", ATTENTION),
        ("partial_attention_rows_kernel", ATTENTION),
        ("context_mask_kernel", MOVING),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", ATTENTION),
        ("layer_norm_kernel", NORMS),
        ("residual_norm_kernel", NORMS),
        ("slot_inputs_kernel", MOVING),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", PRODUCTS),
        ("sm80_xmma_fprop_implicit_gemm_indexed_tf32f32", PRODUCTS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", MOVING),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", NORMS),
        ("Memcpy DtoD (Device -> Device)", MOVING),
        ("unheard_of", OTHER),
    ],
)
def test_what_a_name_counts_as(name, kind):
    assert kind_of(name) == kind


def event(name, start, duration, kind="cpu_op", **arguments):
    thread = 1 if kind in ("cpu_op", "user_annotation", "cuda_runtime") else 7
    times = {"ts": start, "dur": duration, "pid": 1, "tid": thread}
    return {"ph": "X", "cat": kind, "name": name, **times, "args": arguments}


def ranges(*names_and_times):
    return [event(name, *times, kind="user_annotation") for name, *times in names_and_times]


def test_time_belongs_to_the_innermost():
    events = ranges(
        ("call", 0, 100),
        ("ipr_fast::refine_batch", 5, 90),
        ("ipr_fast::tick", 6, 4),  # a step that is tried before the iterations
        ("ipr_fast::iteration", 10, 80),
        ("ipr_fast::tick", 20, 40),
        ("ipr_fast::tick", 60, 30),
        ("ipr_fast::network", 20, 30),
    )
    events += [event("aten::linear", 25, 20), event("aten::addmm", 26, 18), event("aten::copy_", 44, 9)]
    found = split(events, "call")
    assert found.total == 100
    assert found.ticks == found.entered["tick"] == 2
    assert found.times["network", "aten::addmm"] == 18
    assert found.times["network", "aten::linear"] == 1  # what has begun in it counts no further than its end
    assert dict(found.by_range()) == {
        OUTSIDE: 10,
        "refine_batch": 10,
        "iteration": 10,
        "tick": 40,
        "network": 30,
    }
    assert dict(found.by_kind()) == {PRODUCTS: 19, MOVING: 1, BETWEEN: 80}
    assert found.of(PRODUCTS, ATTENTION) == 19


def test_time_of_a_device_belongs_to_where_it_was_launched():
    events = ranges(("call", 0, 50), ("ipr_fast::iteration", 0, 40), ("ipr_fast::tick", 0, 20), ("later", 60, 5))
    events += ranges(("ipr_fast::network", 1, 10))
    events += [event("aten::addmm", 2, 3), event("cudaLaunchKernel", 3, 1, "cuda_runtime", correlation=1)]
    events += [event("cudaGraphLaunch", 15, 1, "cuda_runtime", correlation=2)]
    events += [event("cudaLaunchKernel", 61, 1, "cuda_runtime", correlation=3)]
    events += [event("of_a_library", 30, 7, "kernel", correlation=1), event("later", 62, 9, "kernel", correlation=3)]
    events += [event("denoise_kernel", 37, 5, "kernel", correlation=2), event("what", 42, 8, "kernel", correlation=2)]
    found = split(events, "call", on_device=True)
    assert dict(found.by_range()) == {"network": 7, "tick": 13}
    assert dict(found.by_kind()) == {PRODUCTS: 7, OWN: 5, OTHER: 8}
    assert found.unclassified() == [("what", 8)]
    assert found.unclassified(0.5) == []


def test_a_trace_without_what_is_asked_for_is_refused():
    with pytest.raises(ValueError, match="no range 'call'"):
        split([], "call")
    with pytest.raises(ValueError, match="no work of the device"):
        split(ranges(("call", 0, 1)), "call", on_device=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The trace of a small call, and what was printed."""
    path, printed = tmp_path_factory.mktemp("trace") / "trace.json.gz", io.StringIO()
    with contextlib.redirect_stdout(printed):
        profile_refine.main([*SMALL, "--chrome", str(path)])
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"], printed.getvalue()


def test_the_table_of_a_call_adds_up(recorded):
    events, printed = recorded
    whole = profile_refine.CALL + profile_refine.UNTIL_DONE
    found = split(events, whole)
    call = next(each for each in events if each.get("name") == whole)
    assert found.total == pytest.approx(call["dur"], abs=2 * math.ulp(call["ts"]))
    assert min(found.times.values()) >= -0.01 * found.total
    for rows in (found.by_range(), found.by_kind()):
        assert sum(time for _, time in rows) == pytest.approx(found.total, rel=1e-9)
    assert found.of(OTHER) < 0.02 * found.total
    assert not found.unclassified()
    assert found.ticks == found.entered["network"] == 2
    for table in re.findall(r"^by .*\n((?:  .*\n)+)", printed, flags=re.MULTILINE):
        *rows, (_, last) = re.findall(r"^  (.{42}) +([\d.]+)", table, flags=re.MULTILINE)
        assert sum(float(time) for _, time in rows) == pytest.approx(float(last), abs=0.0006 * len(rows))
    share = round(100 * found.of(PRODUCTS, ATTENTION) / found.total)
    assert f"matrix products, convolutions and attention: {share} % of the engine's time\nwrote " in printed


def test_its_ranges_are_in_the_trace(recorded):
    names = {each["name"] for each in recorded[0] if each.get("cat") == "user_annotation"}
    of_engine = {"refine_batch", "iteration", "renoise", "prepare", "tick", "network", "advance", "denoise"}
    of_model = {"partial_attention", "layer_norm", "residual_norm"}
    assert {f"ipr_fast::{name}" for name in of_engine | of_model} <= names


def test_a_tick_is_drawn(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    import draw_tick

    tick, inside, operators = draw_tick.a_tick(recorded[0])
    assert {"ipr_fast::network", "ipr_fast::denoise"} <= {each["name"] for each in inside}
    assert sum(each["dur"] for each in operators) <= tick["dur"]
    draw_tick.draw(recorded[0], tmp_path / "tick.png", "a tick")
    assert (tmp_path / "tick.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no tick"):
        draw_tick.a_tick([])


def test_for_nsight_there_is_one_call_with_ranges(monkeypatch, capsys):
    entered = []
    monkeypatch.setattr(ipr_fast.trace, "nvtx", object())
    monkeypatch.setattr(ipr_fast.trace, "_nvtx_range", lambda name: entered.append(name) or ipr_fast.trace._OFF)
    profile_refine.main([*SMALL, "--nvtx"])
    assert entered.count("refine_batch") == 1
    assert entered.count("tick") == 2
    assert "one call" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--chains", "0"], ["--steps", "-1"], ["--nvtx", "--chrome", "x"], ["--model", "y"]]
)
def test_options_that_say_nothing_sensible_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        profile_refine.build_parser().parse_args(options)
    assert "error: argument" in capsys.readouterr().err
