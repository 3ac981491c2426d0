"""bench/support/counts.py counts what is known by hand; bench/guard.py fails when a count grows, and only then."""

import json
import sys
from collections import Counter
from dataclasses import replace

import guard
import pytest
import torch
from guard import HOST, SLACK, Row
from support import launches
from support.chains import Step
from support.counts import count
from torch import nn
from torch.nn import functional as F

from ipr_fast import Schedule
from ipr_fast.engine.graph_cache import drop_kept
from ipr_fast.models import PRESETS, PatchTransformer, SRMUNet, packed
from ipr_fast.models.unet import Upsample

SCHEDULE = Schedule(3, 0.8)
needs_triton = pytest.mark.skipif(not launches.can_be_counted(), reason="needs Triton, and not its interpreter")


def moved(work, device="cpu"):
    """The operators of a work, and the bytes of each."""
    return [(each.name, each.bytes) for each in count(work, device).operations]


# --------------------------------------------------------------------------------------------------------- counts


def test_bytes_of_an_elementwise_chain():
    x, y, out = torch.ones(3, 100, 8)
    assert moved(lambda: x.mul(y).add_(x).sum()) == [("mul", 9600), ("add_", 9600), ("sum", 3204)]
    assert moved(lambda: torch.add(x, y, out=out)) == [("add", 9600)]
    assert moved(lambda: (out.copy_(x), out.zero_())) == [("copy_", 6400), ("zero_", 3200)]
    assert moved(lambda: x.bool()) == [("_to_copy", 3200 + 800)]


def test_what_an_index_picks_and_what_is_expanded():
    table, rows, row = torch.ones(1000, 4), torch.tensor([1, 5, 5]), torch.ones(4)
    assert moved(lambda: F.embedding(rows, table)) == [("embedding", 24 + 2 * 48)]
    assert moved(lambda: table.index_select(0, rows)) == [("index_select", 24 + 2 * 48)]
    assert moved(lambda: table.index_copy_(0, rows, torch.empty(3, 4))) == [("index_copy_", 24 + 2 * 48)]
    assert moved(lambda: row.expand(1000, 4) + table) == [("add", 16 + 2 * 16000)]


def test_views_and_reserved_memory_are_free():
    x = torch.ones(6, 4)
    found = count(lambda: (x.view(4, 6).t()[1:], x.chunk(2), x.to(torch.float32), torch.empty(5)), "cpu")
    assert found.operations == []
    assert (found.allocations, found.allocated) == (1, 20)


def test_looks_at_the_data_are_counted_once():
    x = torch.tensor([0.0, 1.0])
    assert count(lambda: (x[0].item(), x.nonzero(), x[x > 0], x + 1, bool(x.any())), "cpu").host_syncs == 4
    assert count(lambda: (torch.ones(2, device="meta").copy_(x), torch.ones(2)), "meta").host_syncs == 1
    assert count(lambda: (x[0].item(), x + x), "meta").operations == []  # the host's own business


def test_flops_of_a_small_transformer_by_hand(model):
    """Two layers of width 32 and 2 heads; 16 patches of 16 numbers, all active; 64 features of a level."""
    tokens, width, numel = 3 * 16, 32, 16
    embed = numel * width + 64 * width + width * width + width * 6 * width + width * 2 * width
    layer = width * 3 * width + width * width + 2 * width * 4 * width
    weights = embed + 2 * layer + width * (2 * numel + 1)
    attention = 2 * 2 * (3 * 16 * 16) * width  # layers, two products
    patches, levels = torch.zeros(3, 16, 16), torch.zeros(3, 16)
    assert count(lambda: model(patches, levels), "cpu").flops == 2 * (tokens * weights + attention)


@pytest.mark.parametrize(("preset", "gflop"), [("even_pixels", 3.5), ("counting_polygons", 126), ("mnist_sudoku", 487)])
def test_gflop_a_call_of_the_presets(preset, gflop):
    """As the README has them, without memory for the weights."""
    with torch.device("meta"):
        unet = SRMUNet(PRESETS[preset]).eval()
        patches = torch.empty(1, unet.grid.num_patches, unet.grid.patch_numel)
        levels = torch.empty(1, unet.grid.num_patches)
    found = count(lambda: unet(patches, levels), "meta").flops / 1e9
    assert float(f"{found:.{2 if preset == 'even_pixels' else 3}g}") == gflop


def test_packed_layers_by_hand():
    conv, layer, weights = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Linear(16, 24), packed.PackedWeights()
    model = nn.ModuleList([conv, layer])
    if not packed._can_be_packed(layer):
        pytest.skip("a build without oneDNN")
    layers, kernel = 4 * (6 * 8 * 9), 4 * (24 * 16)
    made = [(f"mkldnn::_reorder_{of}_weight", 0, 2 * n) for of, n in (("convolution", layers), ("linear", kernel))]
    found = count(lambda: weights.pack(model), "cpu")
    assert found.operations == made
    assert (found.allocations, found.allocated) == (2, layers + kernel)
    x, y, rows = torch.ones(2, 8, 6, 6), torch.ones(2, 6, 3, 3), torch.ones(200, 16)
    flops, moved = 2 * y.numel() * 8 * 9, x.nbytes + layers + 4 * 6
    named = "mkldnn::_convolution_pointwise"
    assert count(lambda: packed.convolution(conv, x, weights), "cpu").operations == [(named, flops, moved + y.nbytes)]
    plus = count(lambda: packed.convolution(conv, x, weights, plus=y), "cpu")
    assert (plus.operations, plus.allocations) == ([(named, flops, moved + 2 * y.nbytes)], 1)
    onto = count(lambda: packed.convolution(conv, x, weights, onto=y), "cpu")
    assert (onto.operations, onto.allocations) == ([(named + "_", flops, moved + 2 * y.nbytes)], 0)
    linear = count(lambda: packed.linear(layer, rows, weights, gelu=True), "cpu")
    moved = rows.nbytes + kernel + 4 * 24 + 4 * 200 * 24
    assert linear.operations == [("mkldnn::_linear_pointwise", 2 * 200 * 24 * 16, moved)]


def test_packed_layers_have_the_flops_of_plain_ones_but_for_upsampling(model, monkeypatch):
    """A convolution of C to D channels after 2x upsampling of x pixels takes 2 * 16 C D x, not 2 * 36 C D x."""
    unet = SRMUNet(PRESETS["even_pixels"]).eval().requires_grad_(False)
    convs = [layer.conv for layer in unet.modules() if isinstance(layer, Upsample)]
    saved = sum(
        2 * 20 * conv.in_channels * conv.out_channels * 2 * size**2
        for conv, size in zip(convs, (4, 8, 16), strict=True)
    )
    found = {}
    for name, network in (("transformer", PatchTransformer(model.config)), ("unet", unet)):
        for way in ("packed", "plain"):
            if way == "plain":
                monkeypatch.setattr(packed, "_can_be_packed", lambda layer: False)
            step = Step.begun(network.eval().requires_grad_(False), 2, 4, SCHEDULE, "cpu")
            found[name, way] = count(step.tick, "cpu").flops
        monkeypatch.undo()
    assert found["transformer", "packed"] == found["transformer", "plain"]
    if packed._can_be_packed(nn.Linear(1, 1)):
        assert found["unet", "plain"] - found["unet", "packed"] == saved


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_tensors_without_data_count_as_those_with(model, network, monkeypatch):
    """Every count of plain layers, also of copies that depend on how results are laid out."""
    monkeypatch.setattr(packed, "_can_be_packed", lambda layer: False)
    if network == "unet":
        model = SRMUNet(PRESETS["even_pixels"]).eval().requires_grad_(False)
    else:
        model = PatchTransformer(model.config).eval().requires_grad_(False)
    found = []
    for device in ("cpu", "meta"):
        step = Step.begun(model.to(device), 2, 4, SCHEDULE, device)
        found.append([guard.summary(count(part, device)) for part in (step.begin, step.tick)])
    assert found[0] == found[1]
    assert found[0][1][HOST] == 0


@needs_triton
def test_kernels_are_counted_and_not_launched(model):
    step = Step.begun(PatchTransformer(model.config).to("meta"), 5, 4, SCHEDULE, "meta")
    begin, tick = (count(part, "meta", kernels=True) for part in (step.begin, step.tick))
    assert begin.by_name["renoise_kernel"] == tick.by_name["advance_kernel"] == tick.by_name["denoise_kernel"] == 1
    assert tick.by_name["partial_attention_rows_kernel"] == model.config.depth
    by_name = {each.name: each for each in tick.operations}
    active, width = 5 * 4, model.config.width
    assert by_name["denoise_kernel"].bytes == active * 16 * (8 + 4 + 4 + 4)
    assert by_name["advance_kernel"].bytes == active * (24 + 8)
    norms = [each.bytes for each in tick.operations if each.name == "residual_norm_kernel"]
    assert norms == [active * (3 * 4 * width + 12)] + 2 * model.config.depth * [active * (4 * 4 * width + 8)]
    attention, moved = by_name["partial_attention_rows_kernel"], 4 * (2 * active + 2 * 5 * 16) * width + 4 * 5 * 16
    assert (attention.flops, attention.bytes) == (4 * active * 16 * width, moved)
    context = {each.name: each.bytes for each in begin.operations}
    assert context["slot_inputs_kernel"] == active * (2 * 4 * 16 + 24)
    tokens, row = 4 * 5 * 16 * width, 4 * width  # where one row modulates every token
    assert context["layer_norm_kernel"] == 2 * tokens + 2 * row
    assert context["residual_norm_kernel"] == 4 * tokens + 3 * row
    twins = count(step.tick, "meta")
    assert twins.flops == tick.flops
    assert len(twins.operations) > 2 * len(tick.operations)
    assert not any(each.name.endswith("_kernel") for each in twins.operations)


@needs_triton
def test_on_a_gpu_a_convolution_adds_its_bias_in_a_pass_of_its_own():
    conv, x = nn.Conv2d(3, 8, 3, padding=1, device="meta"), torch.empty(2, 3, 5, 7, device="meta")
    found = count(lambda: conv(x), "meta", kernels=True)
    (name, _, whole), bias = found.operations
    assert (name, bias) == ("convolution", ("add_", 0, 2 * 4 * 2 * 8 * 5 * 7))
    assert count(lambda: conv(x), "meta").operations == found.operations[:1]
    conv.bias = None
    assert [each.bytes for each in count(lambda: conv(x), "meta", kernels=True).operations] == [whole - 4 * 8]


def test_a_product_that_adds_to_a_matrix_counts_as_the_product():
    sums, a, b = torch.zeros(5, 8), torch.zeros(5, 3), torch.zeros(3, 8)
    (product,) = count(lambda: sums.addmm_(a, b), "cpu").operations
    assert product == ("addmm_", 2 * 5 * 3 * 8, 4 * (2 * 5 * 8 + 5 * 3 + 3 * 8))


@needs_triton
def test_every_kernel_has_its_bytes():
    """A kernel that picks among its tensors' rows must say how many bytes it moves."""
    names = {kernel.__name__ for _, _, kernel in launches._kernels()}
    assert names == {*launches.BYTES, "pixel_features_kernel", "pixel_head_kernel"}


@needs_triton
def test_pixel_networks_add_four_kernels(model):
    """Their own two, a cast, a product, a sum; the sigmoid of the mix is in a kernel either way."""
    found = []
    for pixel_width in (None, 16):
        network = PatchTransformer(replace(model.config, pixel_width=pixel_width)).half().to("meta")
        found.append(count(Step.begun(network, 5, 4, SCHEDULE, "meta").tick, "meta", kernels=True))
    linear, pixels = found
    assert pixels.by_name - linear.by_name == Counter(
        ["_to_copy", "add", "linear", "pixel_features_kernel", "pixel_head_kernel"]
    )
    assert not linear.by_name - pixels.by_name


# ---------------------------------------------------------------------------------------------------------- guard


def summary(**counts):
    return dict.fromkeys(SLACK, 1000) | {name.replace("_", " "): value for name, value in counts.items()}


BASE = {"torch": "2.0.0", "cases": {"a": summary() | {"operators": {"add": 600, "mul": 400}}}}


def now(torch_version="2.0.0", operators=None, **counts):
    case = summary(**counts) | {"operators": operators or {"add": 600, "mul": 400}}
    return {"torch": torch_version, "cases": {"a": case, "b, as kernels": summary() | {"operators": {}}}}


@pytest.fixture
def base():
    return {"torch": "2.0.0", "cases": BASE["cases"] | {"b, as kernels": summary() | {"operators": {}}}}


def test_the_same_is_well(base):
    said, well = guard.verdict(base, now())
    assert well
    assert "FAILED" not in said
    assert "--update" not in said


@pytest.mark.parametrize("name", SLACK)
def test_worse_fails_and_better_does_not(base, name):
    slack = int(SLACK[name] * 1000)
    key = name.replace(" ", "_")
    for more, fails in ((slack, False), (slack + 1, True), (-slack, False)):
        assert guard.verdict(base, now(**{key: 1000 + more}))[1] is not fails
    said, well = guard.verdict(base, now(**{key: 1000 - slack - 1}))
    assert well
    assert "run --update to keep it" in said


def test_it_names_the_operators_that_are_more(base):
    said, well = guard.verdict(base, now(operator_calls=1002, operators={"add": 599, "mul": 400, "cat": 3}))
    assert not well
    assert "a: add -1, cat +3" in said
    assert "FAILED: a: operator calls worse" in said


def test_another_torch_fails_on_looks_at_the_data_alone(base):
    said, well = guard.verdict(base, now("3.0.0", operator_calls=2000, FLOPs=2000))
    assert well
    assert "of torch 2.0.0, this is 3.0.0" in said
    assert "worse, +1,000 (+100.00%)" in said
    assert not guard.verdict(base, now("3.0.0", host_synchronisations=1001))[1]


def test_a_build_without_packed_weights_is_another_torch(monkeypatch):
    version = torch.__version__.split("+")[0]
    for there, named in ((True, version), (False, f"{version} without oneDNN")):
        monkeypatch.setattr(packed, "_can_be_packed", lambda layer, there=there: there)
        assert guard.torch_build() == named


def test_a_case_more_or_fewer_fails(base):
    fewer = {"torch": "2.0.0", "cases": {"b, as kernels": summary() | {"operators": {}}}}
    assert not guard.verdict(base, fewer)[1]
    assert not guard.verdict(fewer, base)[1]


def test_without_triton_its_cases_are_left_out(base):
    without = {"torch": "2.0.0", "cases": BASE["cases"]}
    said, well = guard.verdict(base, without)
    assert well
    assert "kernels were not counted" in said


def test_a_row_from_nothing_is_worse():
    assert [Row("a", HOST, 0, now).verdict for now in (0, 1)] == ["same", "worse"]
    assert Row("a", "bytes", 0, 1).verdict == "worse"


def test_whole_calls_do_not_look_at_the_data_in_an_iteration(model):
    found = guard.calls(model, 3)
    assert set(found) == {"generate", "refine", "one iteration more"}
    assert found["one iteration more"][HOST] == 0
    assert 0 < found["one iteration more"]["operator calls"] < found["refine"]["operator calls"]
    assert found == guard.calls(model, 3)
    drop_kept()


def test_the_command(monkeypatch, tmp_path, capsys, base):
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "guard.json")
    monkeypatch.setattr(guard, "count_all", lambda: base["cases"])
    monkeypatch.setattr(guard, "can_be_counted", lambda: True)
    monkeypatch.setattr(guard, "triton", guard)  # any: that there is one
    monkeypatch.setattr(sys, "argv", ["guard.py", "--update"])
    guard.main()
    stored = json.loads(guard.BASELINE.read_text())
    assert stored == {"torch": guard.torch_build(), "cases": base["cases"]}
    monkeypatch.setattr(sys, "argv", ["guard.py", "--json"])
    guard.main()
    assert json.loads(capsys.readouterr().out) == stored
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    worse = base["cases"] | {"a": base["cases"]["a"] | {"allocations": 1001}}
    for counted, status in ((base["cases"], 0), (worse, 1)):
        monkeypatch.setattr(guard, "count_all", lambda counted=counted: counted)
        with pytest.raises(SystemExit) as left:
            guard.main()
        assert left.value.code == status
    assert "| a | allocations | 1,000 | 1,001 | worse, +1 (+0.10%) |" in capsys.readouterr().out


def test_the_stored_baseline_has_every_case_that_is_counted():
    stored = json.loads(guard.BASELINE.read_text())
    assert {part.split(": ")[1] for part in stored["cases"]} >= {"generate", "refine", "tick", "tick, as kernels"}
    for case in stored["cases"].values():
        assert set(case) == {*SLACK, "operators"}
        assert sum(case["operators"].values()) == case["operator calls"]
