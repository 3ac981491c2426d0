"""Help and usage errors: groups, examples, defaults, at any width, on a terminal or not."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer

from ipr_fast import Schedule, __version__, load_model
from ipr_fast.cli import common
from ipr_fast.cli.main import COMMANDS, build_app, main
from ipr_fast.cli.sampling_options import SamplingOptions, schedule_of

NAMES = [module.__name__.rpartition(".")[2] for modules in COMMANDS.values() for module in modules]


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture(params=[80, 120])
def _width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_width")
@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_its_options_in_groups_and_an_example_that_parses(name, capsys):
    text = help_of(capsys, name)
    assert "\x1b" not in text
    command = typer.main.get_command(build_app()).commands[name]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    assert all(option in text for option in options)
    panels = re.findall(r"╭─ ([\w ]+?) ─", text)
    assert len(panels) == len(set(panels))
    assert not [p.name for p in command.params if p.param_type_name == "option" and not p.rich_help_panel]
    (example,) = re.findall(rf"^ Example: ipr-fast {name}\b(.*)$", text, flags=re.MULTILINE)
    command.make_context(name, shlex.split(example))


@pytest.mark.usefixtures("_width")
def test_the_main_help_lists_the_commands_in_groups(capsys):
    text = help_of(capsys)
    panels = re.findall(r"╭─ ([\w ]+?) ─", text)
    assert panels == ["Options", *COMMANDS]
    assert re.findall(r"^│ (\w+)  ", text, flags=re.MULTILINE) == NAMES


def test_values_that_a_command_computes_are_described(capsys):
    text = " ".join(help_of(capsys, "refine").replace("│", " ").split())
    for words in ("the model's", "as stored", "256 on a CPU, 4096 on a GPU", "cuda if there is one", "default: 50"):
        assert words in text


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"ipr-fast {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--count", "0"], "'--count' / '--boards': Input should be greater than or equal to 1, got '0'"),
        (["demo", "--seed", "x"], "'--seed': Input should be a valid integer"),
        (["demo", "--clues", "1"], "'--clues' requires 2 arguments"),
        (["demo", "--clues", "1", "x"], "'--clues': Input should be a valid integer"),
        (["demo", "--itrs", "1"], "No such option: --itrs (Possible options: --iters"),
        (["generate"], "Missing option '--out'"),
        (["generate", "--out", "x", "y\x1b"], r"Got unexpected extra argument(s) (y\x1b)"),
        (["generate", "--out", "x", "--backend", "cuda"], "must be one of auto, graphs, reference, torch, got 'cuda'"),
        (["generate", "--out", "x", "--max-chains", "0"], "must be auto or an integer >= 1, got '0'"),
        (["train", "--out", "x", "--task", "chess"], "'--task': must be one of digit-sudoku-4x4, "),
        (["convert", "x"], "Missing argument 'OUT'"),
    ],
)
def test_wrong_usage_names_the_option_and_the_value(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert re.fullmatch(rf"ipr-fast {arguments[0]}: error: .*\. See ipr-fast {arguments[0]} --help\n", captured.err)


def test_a_schedule_of_two_values():
    assert schedule_of("--schedule", None) is None
    assert schedule_of("--schedule", ("4", "0.5")) == Schedule(4, 0.5)
    with pytest.raises(ValueError, match=r"^--schedule: must be an integer and a number, got 2\.5 0$"):
        schedule_of("--schedule", ("2.5", "0"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"shift": 3.0}, Schedule(10, 0.8, 3.0)),
        ({"schedule": ("4", "0.5"), "shift": 0.5, "group": 2}, Schedule(4, 0.5, 0.5, 2)),
    ],
)
def test_shift_and_group_change_the_models_schedule_or_the_given_one(given, expected):
    model = load_model("digit-sudoku-4x4")
    options, run = SamplingOptions(**given), common.RunOptions(device="cpu")
    arguments = options.arguments(run, torch.device("cpu"), 2, model, "refine_schedule")
    assert arguments["schedule"] == expected


def blocks(language):
    readme = (Path(common.__file__).parent / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


def test_the_readmes_examples_run(tmp_path, monkeypatch):
    """64 boards as PNG files; then a model of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mymodel.py").write_text(blocks("python")[0])
    for line in "".join(blocks("bash")).splitlines():
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0
    assert len(list(Path("refined").glob("*.png"))) == 64
    assert np.load("refined.npy").shape == (4, 1, 16, 16)
    del sys.modules["mymodel"]


def test_the_readmes_new_command_runs(tmp_path, monkeypatch, capsys):
    module = ModuleType("ipr_fast.cli.count")
    exec(compile(blocks("python")[1], "count.py", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "ipr_fast.cli.count", module)
    monkeypatch.setitem(COMMANDS, "Samples", (module,))
    np.save(tmp_path / "x.npy", np.zeros((3, 1, 4, 4), dtype=np.float32))
    assert main(["count", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out == "3\n"
    assert main(["count", str(tmp_path / "x.npy"), "--least", "4"]) == 1
    assert "x.npy: has 3 samples, fewer than --least 4" in capsys.readouterr().err
    assert "Fewest samples to accept." in help_of(capsys, "count")
