"""The scripts and the guide of profiling/: what they would run, and what they say where a tool is missing."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import profile_refine
import pytest
import torch
from where_time_goes import ATTENTION, MOVING, NORMS, OWN, PRODUCTS, kind_of

PROFILING = Path(__file__).resolve().parents[2] / "profiling"
GUIDE = (PROFILING / "README.md").read_text()
needs_bash = pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="needs bash")


@needs_bash
@pytest.mark.parametrize(
    ("script", "tool", "instead"),
    [
        ("nsys.sh", "nsys", "profile_refine.py --chrome"),
        ("ncu.sh", "ncu", "profile_refine.py --chrome"),
        ("sanitize.sh", "compute-sanitizer", "TRITON_INTERPRET=1"),
    ],
)
def test_a_script_says_which_tool_is_missing(script, tool, instead):
    done = run(script, environment={"PATH": ""})
    assert done.returncode == 3
    assert f"{tool} is not installed" in done.stderr
    assert instead in done.stderr
    assert not done.stdout


@needs_bash
@pytest.mark.parametrize("script", ["nsys.sh", "ncu.sh", "sanitize.sh"])
def test_a_script_explains_itself(script):
    done = run(script, "--help", environment={"PATH": ""})
    assert done.returncode == 0
    assert f"    profiling/{script} [--print]" in done.stdout
    assert "#" not in done.stdout


@needs_bash
def test_launches_are_counted_by_numbers():
    done = run("ncu.sh", "--print", "--skip", "-5")
    assert (done.returncode, done.stderr) == (2, "--skip needs a number, got -5\n")


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_script_says_that_there_is_no_gpu(tmp_path):
    (tmp_path / "nsys").write_text("#!/bin/sh\nexit 99\n")
    (tmp_path / "nsys").chmod(0o755)
    done = run("nsys.sh", environment={"PATH": str(tmp_path), "PYTHON": sys.executable})
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr


@needs_bash
def test_what_nsys_would_run():
    profile, stats = printed_by("nsys.sh", "out", "--chains", "64")
    assert profile[:2] == ["nsys", "profile"]
    assert {"--capture-range=cudaProfilerApi", "--cuda-graph-trace=node", "--output=out"} <= set(profile)
    assert its_options(profile).chains == 64
    assert stats[:2] == ["nsys", "stats"]
    assert stats[-1] == "out.nsys-rep"
    whole, _ = printed_by("nsys.sh", "--whole-graphs")
    assert "--cuda-graph-trace=graph" in whole


@needs_bash
def test_what_ncu_would_run():
    command, show = printed_by("ncu.sh", "--skip", "3", "--count", "5", "out", "denoise", "--model", "Even Pixels")
    assert command[command.index("--kernel-name") + 1] == "regex:denoise"
    assert command[command.index("--launch-skip") + 1] == "3"
    assert command[command.index("--launch-count") + 1] == "5"
    assert command[command.index("--set") + 1] == "full"
    assert its_options(command).model == "Even Pixels"
    assert its_options(command).backend == "torch"
    assert "out.ncu-rep" in show
    own, _ = printed_by("ncu.sh", "--roofline")
    assert "SpeedOfLight_RooflineChart" in own
    pattern = own[own.index("--kernel-name") + 1].removeprefix("regex:")
    sources = (PROFILING.parent / "kernels").glob("*.py")
    kernels = [
        name for file in sources for name in re.findall(r"^def (\w+_kernel)\(\n", file.read_text(), re.MULTILINE)
    ]
    assert len(kernels) >= 8
    assert all(re.search(pattern, name) for name in kernels)
    assert all(kind_of(name) in (OWN, PRODUCTS, ATTENTION, NORMS, MOVING) for name in kernels)


def commands():
    """The commands of the guide, without the interpreter's path."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if "profiling/" in line]


def test_the_guide_names_whatever_can_be_run():
    for file in [*PROFILING.glob("*.py"), *PROFILING.glob("*.sh")]:
        if "__main__" in file.read_text() or file.read_text().startswith("#!"):
            assert file.name in GUIDE, file.name
    for target in re.findall(r"\]\(([^)h][^)]*)\)", GUIDE):
        assert (PROFILING / target).exists(), target


def test_its_commands_are_accepted():
    for words in commands():
        script, *options = words[1:] if words[0].endswith("python") else words
        path = PROFILING.parent / script
        assert path.exists(), script
        if path.name == "profile_refine.py":
            profile_refine.build_parser().parse_args(options)
        elif path.suffix == ".py":
            assert all(f'"{option}"' in path.read_text() for option in options if option.startswith("--")), words


@needs_bash
def test_its_commands_for_nsight_are_accepted():
    scripts = [words for words in commands() if words[0].endswith(".sh")]
    assert {Path(words[0]).name for words in scripts} == {"nsys.sh", "ncu.sh", "sanitize.sh"}
    for script, *options in scripts:
        first, *_ = printed_by(Path(script).name, *options)
        if any(word.endswith("profile_refine.py") for word in first):
            its_options(first)


def run(script, *options, environment=None):
    command = [shutil.which("bash"), PROFILING / script, *options]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def printed_by(script, *options):
    """The commands that a script would run, word by word."""
    done = run(script, "--print", *options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def its_options(command):
    """What profile_refine.py makes of its part of a command."""
    start = next(i for i, word in enumerate(command) if word.endswith("profile_refine.py"))
    return profile_refine.build_parser().parse_args(command[start + 1 :])
