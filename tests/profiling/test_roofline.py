"""The floors of profiling/roofline.py, by hand, and the script from its options to its table."""

import json
import sys

import pytest
import roofline
import torch
from floors import Roof, Work, floors, work_of_tick
from small_models import TINY
from support.counts import Operation
from support.launches import can_be_counted

from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig

ROOF = Roof(peak=100.0, bandwidth=10.0)
TINY_UNET = SRMUNetConfig(1, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)


def test_floors_by_hand():
    operations = [Operation("product", 1000, 40), Operation("add", 0, 30), Operation("product", 100, 20)]
    work = Work(operations, flops=1100, bytes=90, least_bytes=50)
    assert floors(work, ROOF) == (11.0, "compute", 10.0 + 3.0 + 2.0, 5.0 / 15.0, "product", 12.0 / 15.0)
    assert floors(work._replace(least_bytes=120), ROOF)[:2] == (12.0, "memory")


def test_the_least_bytes_of_a_transformer_by_hand():
    with torch.device("meta"):
        model = PatchTransformer(TINY).requires_grad_(False)
    work = work_of_tick(model, 3, kernels=False)
    width, depth, slots = TINY.width, TINY.depth, 3 * 4
    layer = 12 * width * width + (3 + 1 + 4 + 1) * width
    tokens = (16 + 1) * width + (width + 1) * 33  # patches in and out
    tables = 16 * (depth * 6 * width + 2 * width) + 16 * width  # of sixteen levels; of sixteen places
    context = 2 * depth * (3 * 16 + 1) * width
    state, predictions = 2 * slots * 16, slots * 33
    assert work.least_bytes == 4 * (depth * layer + tokens + tables + context + state + predictions)
    assert work.least_bytes < work.bytes


def test_a_model_without_a_context_reads_every_patch():
    with torch.device("meta"):
        model = SRMUNet(TINY_UNET).requires_grad_(False)
    one, two = (work_of_tick(model, batch, kernels=False).least_bytes for batch in (1, 2))
    assert two - one == 4 * (16 * 16 + 4 * 16 + 4 * 33)


def test_floors_grow_with_the_batch():
    with torch.device("meta"):
        model = PatchTransformer(TINY).requires_grad_(False)
    found = [work_of_tick(model, batch, kernels=False) for batch in (1, 8, 64)]
    assert found[2].flops == 8 * found[1].flops == 64 * found[0].flops
    assert found[2].least_bytes < 64 * found[0].least_bytes  # weights are read once
    for work in found:
        both = floors(work, ROOF)
        assert 0 < both.ideal <= both.as_launched


@pytest.fixture
def script(monkeypatch, capsys):
    """Run the script with options, on two small models; returns what it prints."""
    small = {"A": lambda: PatchTransformer(TINY).requires_grad_(False), "B": lambda: SRMUNet(TINY_UNET)}
    monkeypatch.setattr(roofline, "makers", lambda smoke: small)
    monkeypatch.setattr(roofline, "ROUNDS", 2)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["roofline.py", "--device", "cpu", *map(str, options)])
        roofline.main()
        return capsys.readouterr().out

    return run


def test_the_script_measures_and_writes(script, tmp_path):
    given = ["--peak-tflops", 0.05, "--bandwidth-gbs", 10]
    printed = script("--batches", 1, 3, "--measure", *given, "--out", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert "0.05 TFLOP/s in float32 and 10 GB/s, as given" in printed
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(row["model"], row["batch"]) for row in found["rows"]] == [("A", 1), ("A", 3), ("B", 1), ("B", 3)]
    for row in found["rows"]:
        assert row["over"] == pytest.approx(row["seconds"] / row["as_launched"])
    assert (tmp_path / "a.png").stat().st_size > 1000
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1


def test_the_script_says_what_it_does_not_measure(script):
    """Under a roof so low that every tick seems too long."""
    assert script("--models", "A", "--batches", 1, "--measure", "--peak-tflops", 1e-9, "--bandwidth-gbs", 1).count(
        "too long"
    )


@pytest.mark.skipif(not can_be_counted(), reason="needs Triton, and not its interpreter")
def test_the_floors_of_another_machine(script):
    printed = script("--models", "A", "--batches", 64, "--machine", "h200", "--dtype", "bfloat16")
    assert "989 TFLOP/s in bfloat16 and 4,800 GB/s, as given" in printed
    assert "as Triton kernels" in printed


@pytest.mark.parametrize(
    "options",
    [
        ["--batches", 0],
        ["--peak-tflops", 1],
        ["--machine", "h200", "--peak-tflops", 1, "--bandwidth-gbs", 1],
        ["--peak-tflops", 1, "--bandwidth-gbs", -1],
    ],
)
def test_options_that_make_no_sense(script, options):
    with pytest.raises(SystemExit):
        script(*options)
