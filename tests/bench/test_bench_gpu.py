"""bench/gpu.py as far as it goes without a GPU: two processes, whatever becomes of them, and one file."""

import json
import sys
import time

import gpu
import pytest
import torch
from gpu import Outcome

PASSED, FAILED = Outcome(True, "3 passed in 1s"), Outcome(False, "1 failed, 2 passed in 1s")
FIGURES = {"machine_info": {"device": "NVIDIA H100 80GB HBM3"}, "benchmarks": []}


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("print('3 passed in 1s')", Outcome(True, "3 passed in 1s")),
        ("print('1 failed'); raise SystemExit(1)", Outcome(False, "1 failed")),
        ("raise SystemExit(5)", Outcome(False, "no output")),
        ("import os; print('hm', flush=True); os.abort()", Outcome(False, "ended by signal 6; its last line: hm")),
    ],
)
def test_a_process_and_what_it_means(script, outcome, capsys):
    assert gpu.run([sys.executable, "-c", script], 60) == outcome
    assert outcome.summary.split()[-1] in capsys.readouterr().out + "output"


def test_a_process_that_takes_too_long_is_killed_with_what_it_has_started():
    """What it has started shares its output, which is read to the end."""
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('begun', flush=True); time.sleep(60)"
    start = time.monotonic()
    assert gpu.run([sys.executable, "-c", script], 1) == Outcome(False, "killed after 1 s; its last line: begun")
    assert time.monotonic() - start < 30


def test_both_phases_keep_compiled_kernels_in_one_place(monkeypatch):
    script = "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "own")
    for _ in range(2):
        assert gpu.run([sys.executable, "-c", script], 60).summary == f"{gpu.ROOT / '.caches' / 'triton'} own"


def test_the_checks_have_time_to_compile_all_kernels():
    """1.75 times the 152 + 120 s that their two halves took on an H100 beside other work, with empty caches."""
    assert gpu.CHECKS_SHARE * gpu.MINUTES * 60 >= 1.75 * (152 + 120)


@pytest.fixture
def runs(monkeypatch):
    """The commands and limits of processes that are not started; `outcomes` says how they end, and what they write."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs = type("Runs", (), {"made": [], "checks": PASSED, "bench": PASSED, "text": json.dumps(FIGURES)})()

    def run(command, limit):
        runs.made.append((command, limit))
        if "--benchmark-json" not in command:
            return runs.checks
        with open(command[command.index("--benchmark-json") + 1], "w") as file:
            file.write(runs.text)
        return runs.bench

    monkeypatch.setattr(gpu, "run", run)
    return runs


@pytest.mark.parametrize(("checks", "bench"), [(PASSED, PASSED), (PASSED, FAILED), (FAILED, PASSED)])
def test_figures_are_kept_with_what_was_checked(runs, tmp_path, capsys, checks, bench):
    runs.checks, runs.bench, out = checks, bench, tmp_path / "new" / "h100.json"
    status = gpu.main(["--minutes", "5", "--out", str(out), "--commit", "abc"])
    assert status == (0 if checks.passed and bench.passed else 1)
    machine = json.loads(out.read_text())["machine_info"]
    assert machine["checks"] == checks._asdict()
    assert machine["bench"] == bench._asdict()
    (_, first), (command, second) = runs.made
    assert 0 < first < 300 < second < 300 + gpu.GRACE + 1
    assert " ".join(command).endswith("--commit abc")
    assert "--sizes full --minutes 5.0" in " ".join(command)
    printed = capsys.readouterr().out
    assert f"passed bench: {PASSED.summary}" in printed or f"FAILED bench: {FAILED.summary}" in printed


def test_one_of_the_two(runs, tmp_path):
    out = tmp_path / "h100.json"
    assert gpu.main(["--only", "checks", "--out", str(out)]) == 0
    assert len(runs.made) == 1
    assert not out.exists()
    assert gpu.main(["--only", "bench", "--out", str(out)]) == 0
    assert len(runs.made) == 2
    assert "checks" not in json.loads(out.read_text())["machine_info"]


def test_without_figures_an_earlier_file_is_left_alone(runs, tmp_path, capsys):
    runs.bench, runs.text, out = Outcome(False, "killed after 9 s; its last line: ..."), "", tmp_path / "h100.json"
    out.write_text("earlier")
    assert gpu.main(["--out", str(out)]) == 1
    assert out.read_text() == "earlier"
    printed = capsys.readouterr().out
    assert "no figures" in printed
    assert "FAILED bench: killed after 9 s" in printed


def test_a_file_has_the_name_of_the_device():
    assert gpu.default_path(FIGURES, smoke=False).name == "bench-h100-80gb-hbm3.json"
    assert gpu.default_path(FIGURES, smoke=True).name == "gpu-smoke.json"


def test_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--only", "checks"])
    assert "--smoke has no checks" in capsys.readouterr().err


def test_a_trial_of_the_benchmarks_without_time(tmp_path):
    """Every benchmark is found, and left out, by a process that runs as it does on a GPU; nothing is written."""
    out = tmp_path / "trial.json"
    assert gpu.main(["--smoke", "--minutes", "0", "--out", str(out)]) == 0
    assert not out.exists()
