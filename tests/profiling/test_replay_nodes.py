"""The nodes of a replay: counted, as the guard holds them, and read from the log of a stub CUDA."""

import json

import guard
import pytest
import replay_nodes
from support.launches import can_be_counted
from where_time_goes import ATTENTION, MOVING, NORMS, OTHER, OWN, PRODUCTS

LOG = """\
KERNEL\ttriton:renoise_kernel\tstream0\t-\t64
BEGIN-CAPTURE\tstream1\tmode1
KERNEL\t_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEE\tstream1\tcapture\t1
END-CAPTURE\tstream1\tnodes=1\tok
BEGIN-CAPTURE\tstream1\tmode1
KERNEL\ttriton:renoise_kernel\tstream1\tcapture\t64
MEMSET\t\tstream1\tcapture\t8
END-CAPTURE\tstream1\tnodes=2\tok
BEGIN-CAPTURE\tstream1\tmode1
KERNEL\tcublasLtMatmul ws=0x7f38aa600000+1048576\tstream1\tcapture\t0
KERNEL\tcublasLtMatmul ws=0x7f38aa600000+1048576\tstream1\tcapture\t0
KERNEL\ttriton:layer_norm_kernel\tstream1\tcapture\t64
KERNEL\t_Z39fmha_cutlassF_f32_aligned_64x64_rf_sm80\tstream1\tcapture\t64
KERNEL\ttriton:denoise_kernel\tstream1\tcapture\t64
MEMCPY\tD->D\tstream1\tcapture\t256
END-CAPTURE\tstream1\tnodes=6\tok
"""


def test_a_log_has_the_nodes_of_the_engines_graphs():
    begin, tick = replay_nodes.captured(LOG.splitlines())
    assert (begin.name, begin.nodes, begin.by_kind) == ("begin", 2, {OWN: 1, MOVING: 1})
    assert (tick.name, tick.nodes) == ("tick", 6)
    assert tick.by_kind == {PRODUCTS: 2, NORMS: 1, ATTENTION: 1, OWN: 1, MOVING: 1}


def test_it_is_named_by_an_argument_or_the_environment(tmp_path, monkeypatch, capsys):
    (tmp_path / "log").write_text(LOG)
    replay_nodes.main(["--log", str(tmp_path / "log"), "--operations"])
    by_argument = capsys.readouterr().out
    assert "| capture 2 | tick | 6 | 2 | 1 | 1 | 1 | 1 |" in by_argument
    assert "    2 cublasLtMatmul" in by_argument
    monkeypatch.setenv(replay_nodes.LOG, str(tmp_path / "log"))
    replay_nodes.main(["--operations"])
    assert capsys.readouterr().out == by_argument


@pytest.mark.skipif(not can_be_counted(), reason="needs Triton, without its interpreter")
def test_the_counts_are_those_of_the_guard():
    stored = json.loads(guard.BASELINE.read_text())
    if stored["torch"] != guard.torch_build():
        pytest.skip("operators differ between versions of torch")
    name = "4x4 transformer"
    for part in replay_nodes.counted(name, replay_nodes.makers(smoke=False)[name](), 64):
        assert part.nodes == stored["cases"][f"{name}, 64 chains: {part.name}, as kernels"]["operator calls"]
        assert not part.by_kind[OTHER]
