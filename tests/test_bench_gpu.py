"""The baselines give what refine_batch gives; bench/gpu.py as far as it goes without a GPU."""

import json
import sys

import device_trace
import engine_costs
import gpu
import gpu_report
import harness
import loops
import pytest
import subjects
import throughput
import torch
from harness import Clock, Run
from small_models import TINY, randomise
from subjects import ALL, Case

from ipr_fast import Schedule, random_patches, refine_batch
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["transformer", "unet"])
def denoiser(request):
    if request.param == "transformer":
        return randomise(PatchTransformer(TINY), seed=0)
    torch.manual_seed(0)
    config = SRMUNetConfig(2, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)
    return SRMUNet(config).eval().requires_grad_(False)


@pytest.mark.parametrize("schedule", [Schedule(10, 0.8), Schedule(3, 0.0), Schedule(4, 1.0)], ids=str)
@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_the_loops_equal_refine_batch(denoiser, generator, schedule, seed):
    """With the library's random numbers; an overlap of 1 starts all patches in one step."""
    x = torch.randn(4, *denoiser.grid.sample_shape, generator=generator).clamp(-1, 1)
    options = {"stochasticity": 0.7, "temperature": 0.9}
    ids = torch.tensor([7, 2, 0, 11])
    ours = {"model": denoiser, "schedule": schedule, "seed": seed, "chain_ids": ids, "backend": "torch"}
    expected = refine_batch(x, random_patches(0.3), 3, **ours, **options)
    network, noise = loops.baseline_network(denoiser), loops.LibraryNoise(seed, ids)
    sampling = loops.Sampling(schedule, 0.3, **options)
    torch.testing.assert_close(loops.batched(network, x, 3, sampling, noise), expected, atol=1e-4, rtol=0)
    found = loops.one_at_a_time(network, x, 3, sampling, noise, CPU)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - x).abs().max() > 0.1


def test_the_plain_transformer_is_the_transformer(model, generator):
    patches = torch.randn(5, 16, 16, generator=generator)
    is_active = torch.rand(5, 16, generator=generator) < 0.4
    levels = torch.rand(5, 16, generator=generator) * is_active
    call = patches, levels, is_active
    for found, expected in zip(loops.baseline_network(model)(*call), model.predict(*call), strict=True):
        torch.testing.assert_close(found[is_active], expected[is_active], atol=1e-5, rtol=1e-5)


def test_torch_noise_renoises_as_many_patches_and_no_others(model, generator):
    x = torch.randn(6, 1, 16, 16, generator=generator)
    noise = loops.TorchNoise(CPU)
    assert noise.choose(1, 6, 16, 5).sum(1).tolist() == [5] * 6
    network = loops.baseline_network(model)
    refined = loops.batched(network, x, 1, loops.Sampling(Schedule(2, 0.5)), noise)
    changed = (model.grid.to_patches(refined) != model.grid.to_patches(x)).any(2)
    assert changed.sum(1).tolist() == [4] * 6
    assert loops.one_at_a_time(network, x[:0], 1, loops.Sampling(Schedule(2)), noise, CPU).shape == (0, 1, 16, 16)


# ------------------------------------------------------------------------------------------------- bench/gpu.py


def test_a_trial_of_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loops, "compiled", lambda network: network)
    monkeypatch.setattr(subjects, "cases", lambda smoke, on_gpu, cases=subjects.cases: cases(smoke, True))
    out = tmp_path / "new" / "trial.json"
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["smoke"]
    assert results["environment"]["torch"] == torch.__version__
    parts = results["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert "trial" in parts["checks"]["skipped"][0]
    assert len(parts["kernels"]["rows"]) > 10
    assert parts["throughput"]["passed"]
    for case in parts["throughput"]["cases"]:
        arms = ("ours", "batched") if case["dtype"] == "bfloat16" else ALL
        assert set(case["arms"]) == set(arms)
        assert set(case["faster"]) == set(arms) - {"ours"}
        for arm in case["arms"].values():
            assert len(arm["seconds"]) == 3
            whole = arm["rate_of_its_own_schedule"][1] * case["own_steps"] / case["steps"]
            assert arm["rate"][1] == pytest.approx(whole)
    engine = parts["engine"]
    assert [set(row["variants"]) for row in engine["ticks"]] == [set(engine_costs.VARIANTS)] * 2
    assert engine["ragged"]["clues"]["chain_steps"] < engine["ragged"]["no clues"]["chain_steps"]
    assert engine["trace_events"]
    assert not any("failed" in part for part in parts.values())
    printed = capsys.readouterr().out
    report = out.with_suffix(".md").read_text()
    assert report in printed
    assert "no speed-up below is a claim until they are" in report
    assert gpu.main(["--report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == report.strip()


def test_a_part_that_raises_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    def broken(run):
        run.results["half"] = 1
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "kernels", (broken, 1))
    monkeypatch.setitem(gpu.PARTS, "engine", (lambda run: run.results.update(done=True), 1))
    out = tmp_path / "trial.json"
    assert gpu.main(["--smoke", "--only", "engine", "kernels", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["kernels"]["half"] == 1
    assert parts["kernels"]["failed"]["kernels"]["message"] == "RuntimeError: no such kernel"
    assert "broken" in parts["kernels"]["failed"]["kernels"]["where"]
    assert parts["engine"]["done"]
    assert "FAILED kernels: kernels: RuntimeError: no such kernel" in capsys.readouterr().out
    assert "no such kernel" in out.with_suffix(".md").read_text()


def test_what_does_not_fit_into_the_time_is_said_to_be_left_out(tmp_path, capsys):
    out = tmp_path / "trial.json"
    assert gpu.main(["--smoke", "--minutes", "0", "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert all(part["skipped"] == [f"{name}: no time left"] for name, part in parts.items())
    assert "- engine: engine: no time left" in capsys.readouterr().out


def test_cases_and_measurements_without_time_are_left_out():
    run = Run(CPU, Clock(5))
    throughput.measure(run)
    engine = Run(CPU, Clock(5))
    engine_costs.measure(engine)
    assert len(run.results["skipped"]) == len(subjects.cases(False, True))
    assert run.results["cases"] == []
    assert not run.results["passed"]
    assert "profiler: no time left" in engine.results["skipped"]


def test_it_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "passed", "summary"),
    [
        ("print('3 passed in 1s')", True, "3 passed in 1s"),
        ("print('1 failed'); raise SystemExit(1)", False, "1 failed"),
        ("print('slow', flush=True); import time; time.sleep(60)", False, "not done after 1 s"),
    ],
)
def test_the_checks_and_what_they_mean(script, passed, summary):
    run = Run(CPU, Clock(1.4))
    gpu.checks(run, [sys.executable, "-c", script])
    assert run.results["passed"] is passed
    assert run.results["summary"] == summary
    parts = {"checks": run.results, "throughput": {"passed": True}}
    assert bool(gpu.failures({"parts": parts})) is not passed
    assert ("CHECKS FAILED" in gpu_report._standing({"parts": parts})) is not passed


def test_an_arm_that_does_not_fit_or_fails_leaves_the_others(monkeypatch):
    def batched(network, x, iters, sampling, noise):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    def one_at_a_time(*_):
        raise RuntimeError("not today")

    monkeypatch.setattr(loops, "batched", batched)
    monkeypatch.setattr(loops, "one_at_a_time", one_at_a_time)
    run, rows = Run(CPU, Clock(60), smoke=True), []
    throughput.measure_case(Case("4x4 transformer", 2, most_steps=4), throughput.Bench(run), rows)
    arms = rows[0]["arms"]
    assert "Tried to allocate" in arms["batched"]["does_not_fit"]
    assert list(run.results["failed"]) == ["4x4 transformer, 2 chains, one at a time"]
    assert arms["ours"]["rate"][1] > 0
    assert rows[0]["faster"] == {}
    table = gpu_report._throughput({"cases": rows})[0]
    assert "does not fit" in table
    assert "failed" in table


def test_an_arm_that_takes_too_long_is_not_begun(monkeypatch):
    monkeypatch.setattr(subjects, "makers", lambda smoke, makers=subjects.makers: makers(True))
    bench = throughput.Bench(Run(CPU, Clock(1000)))
    small, large = Case("Even Pixels", 16), Case("Even Pixels", 256)
    bench.remember(small, "batched", 1.0)
    bench.remember(large._replace(batch=1), "batched", 0.5)
    bench.remember(small, "one at a time", 1.0)
    assert bench.expected(large, "batched") == pytest.approx(16)
    assert bench.expected(large, "one at a time") == pytest.approx(1)
    assert "would take about 80 s" in throughput._too_long(large, bench, "batched")
    assert not throughput._too_long(small, bench, "batched")
    assert not throughput._too_long(large, bench, "compiled")
    bench.compile_failed = True
    assert "failed before" in throughput._too_long(large, bench, "compiled")


def test_rounds_take_turns_and_end_with_the_time():
    now, calls = [0.0], []

    def work(name):
        calls.append(name)
        now[0] += 1

    works = {name: lambda name=name: work(name) for name in "abc"}
    assert {len(times) for times in harness.interleaved(works, CPU, 5, Clock(100)).values()} == {5}
    assert "".join(calls) == "abcbcacababcbca"
    clock = Clock(2.0, lambda: now[0])
    now[0] += 3
    assert clock.left() == -1
    assert {len(times) for times in harness.interleaved(works, CPU, 5, clock).values()} == {harness.FEWEST_ROUNDS}
    assert harness.quartiles([2.0]) == [2.0] * 3


def test_the_schedule_is_shortened_no_more_than_needed():
    assert subjects.shortened(Schedule(30, 0.9), 16, 10) == Schedule(4, 0.9)
    assert subjects.shortened(Schedule(10, 0.8), 4, 16) == Schedule(10, 0.8)
    assert subjects.shortened(Schedule(3, 0.0), 20, 10) == Schedule(1, 0.0)


# ------------------------------------------------------------------------------------------------- traces


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


# ------------------------------------------------------------------------------------------------- targets


def test_targets_are_met_missed_or_not_measured():
    row = {"subject": "Even Pixels", "batch": 256, "dtype": "float32"}
    faster = {"one at a time": [90.0, 120.0, 130.0], "batched": [7.0, 7.9, 8.1]}
    outside = {"Even Pixels": {"outside_share": 0.021}, "MNIST Sudoku": {"outside_share": 0.031}}
    parts = {"throughput": {"cases": [row | {"faster": faster}]}, "engine": {"outside": outside, "waits": {"waits": 0}}}
    found = {each.name: each for each in gpu_report.targets({"parts": parts})}
    met = {name: each.met for name, each in found.items()}
    assert met["Even Pixels, 256 chains, against one at a time (a)"]
    assert met["Even Pixels, 256 chains, against batched eager (b)"] is False
    assert met["Even Pixels, 256 chains, against batched, torch.compile (c)"] is None
    assert met["Even Pixels, 64 chains, share of a tick outside the network"]
    assert met["MNIST Sudoku, 64 chains, share of a tick outside the network"] is False
    assert met["the host's waits for the device in three iterations"]
    table = gpu_report._targets({"parts": parts})
    assert "| 8 times | 7.9 times [7.0, 8.1] | **not met** |" in table
    assert "not measured" in table
