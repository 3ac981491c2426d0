"""What every benchmark is measured by: the check comes first, arms take turns, time that is short is kept to."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import harness
from support.harness import Clock
from support.measure import FEWEST_ROUNDS, MOST_ROUNDS, Arm, Check, Measure

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RIGHT, WRONG = Check("the reference", 1e-7, 1e-6), Check("the reference", 0.5, 1e-6)


class Time:
    """A clock that moves only when work is done, and what was done."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def work():
            self.done.append(name)
            self.now += seconds

        return work


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(harness.time, "perf_counter", time)
    return time


class Benchmark:
    """pytest-benchmark's fixture, as far as Measure uses it."""

    def __init__(self, time, disabled):
        self.time, self.disabled, self.extra_info, self.name, self.group = time, disabled, {}, "it", "baselines"
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, function, setup, rounds):
        for _ in range(rounds):
            setup()
            start = self.time()
            function()
            self.stats.stats.data.append(self.time() - start)


def measured(time, check=RIGHT, left=100.0, disabled=False, most=None, **options):
    records = []
    benchmark = Benchmark(time, disabled)
    measure = Measure(benchmark, CPU, Clock(left, time), records, most)
    against = {"slow": Arm(time.work("s", 0.3)), "fast": Arm(time.work("f", 0.1), 2)}
    ours = Arm(time.work("o", 0.2), 4, reset=lambda: time.done.append("r"))
    measure(lambda: check, ours, against, unit="samples", **options)
    return records, benchmark


def test_rounds_and_their_ratios(time):
    (record,), benchmark = measured(time, budget=3.1, subject="a model")
    assert len(record.seconds) == 5  # a round of all three takes 0.6 s
    assert record.facts["subject"] == "a model"
    assert record.facts["check"] == RIGHT._asdict()
    assert record.facts["first_call"] == pytest.approx(0.2)
    assert record.facts["against"]["slow"]["first_call"] == pytest.approx(0.3)
    assert record.ratio("slow") == pytest.approx([6.0] * 3)  # 4 units in 0.2 s over 1 in 0.3 s
    assert record.ratio("fast") == pytest.approx([1.0] * 3)
    assert record.rate() == pytest.approx([20.0] * 3)
    assert json.loads(json.dumps(benchmark.extra_info)) == record.facts


def test_yardsticks_take_turns_and_a_reset_comes_before_each_call(time):
    measured(time, budget=0.0)
    rounds = "".join(time.done).removeprefix("rosf" + "ro")  # the first calls, and what tells that rounds will be few
    assert rounds == "sfro" + "fsro" + "sfro"


def test_no_figure_of_a_wrong_result(time):
    with pytest.raises(AssertionError, match=r"0\.5 off, 1e-06 allowed"):
        measured(time, check=WRONG)
    with pytest.raises(AssertionError, match="nan off"):
        measured(time, check=Check("the reference", float("nan"), 1e-6))
    assert "".join(time.done) == 2 * "rosf"  # the first calls, and no round


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, FEWEST_ROUNDS), (1000.0, MOST_ROUNDS)])
def test_never_fewer_nor_more_rounds(time, budget, rounds):
    (record,), _ = measured(time, left=10_000.0, budget=budget)
    assert len(record.seconds) == rounds


def test_a_budget_for_all_shortens_longer_ones(time):
    for most, budget, rounds in ((3.1, 9.0, 5), (9.0, 3.1, 5), (0.0, 3.1, FEWEST_ROUNDS)):
        (record,), _ = measured(time, budget=budget, most=most)
        assert len(record.seconds) == rounds


@pytest.mark.parametrize("option", ["--budget=nan", "--minutes=-0.5"])
def test_times_that_are_none_are_refused(option):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/bench_operations.py", option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    name, value = option.split("=")
    assert f"{name} must be a number, at least 0, got {float(value)}" in done.stderr


def test_what_does_not_fit_into_the_time_is_skipped(time):
    with pytest.raises(pytest.skip.Exception, match="2 s are left, and it needs about 5"):
        measured(time, left=2.0)
    assert not time.done


def test_where_benchmarks_are_disabled_all_is_checked_and_nothing_recorded(time):
    records, benchmark = measured(time, disabled=True)
    assert not records
    assert not benchmark.extra_info
    with pytest.raises(AssertionError):
        measured(time, check=WRONG, disabled=True)


def test_clocks_within_a_clock():
    now = [0.0]
    clock = Clock(10.0, lambda: now[0])
    half = clock.share(0.5)
    now[0] = 4.0
    assert half.left() == 1.0
    assert clock.left() == 6.0
    assert half.fits(1.0)
    assert not half.fits(1.1)
    assert Clock(float("inf")).share(0.5).fits(1e9)


def test_rounds_take_turns_and_end_with_the_time():
    time = Time()
    works = {name: time.work(name, 1.0) for name in "abc"}
    assert {len(times) for times in harness.interleaved(works, CPU, 5, Clock(100)).values()} == {5}
    assert "".join(time.done) == "abcbcacababcbca"
    clock = Clock(-1.0, time)
    assert {len(times) for times in harness.interleaved(works, CPU, 5, clock).values()} == {harness.FEWEST_ROUNDS}
    assert harness.quartiles([2.0]) == [2.0] * 3


def test_the_most_bytes_of_a_call_and_its_result():
    def work():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b[:10].clone()

    size, made = harness.most_bytes(work, CPU)
    assert size == 2 * 4000
    assert torch.equal(made, torch.ones(10))


@pytest.mark.parametrize(("options", "sizes"), [({"--sizes": "smoke"}, "smoke"), ({"--device": "cpu"}, "small")])
def test_sizes_by_option_or_device(options, sizes):
    class Config:
        def getoption(self, name):
            return options.get(name)

    assert harness.sizes_of(Config()) == sizes
    assert harness.device_of(Config()).type in ("cpu", "cuda")
