"""bench/report.py: tables, targets, pictures and the README's section, of figures made up here."""

import json

import made_up_measurements as made_up
import pytest
import report
from made_up_measurements import row
from reporting import targets, words
from support import records, script


@pytest.fixture
def cpu(tmp_path):
    """Everything, on a CPU."""
    everything = [
        *made_up.operations(),
        made_up.step(),
        *made_up.sweeps(),
        made_up.baselines(targets={"one at a time": 4}),
    ]
    return made_up.write(tmp_path / "cpu.json", everything)


@pytest.fixture
def gpu(tmp_path):
    """Operations and sweeps on a GPU, whose checks have passed."""
    checks = {"passed": True, "summary": "30 passed"}
    there = made_up.operations("cuda") + made_up.sweeps("cuda")
    return made_up.write(tmp_path / "gpu.json", there, **made_up.GPU, checks=checks)


def test_tables_have_what_was_measured(cpu, capsys):
    report.main([str(cpu)])
    text = capsys.readouterr().out
    first = "A Processor, 2 cores, threads: 1; torch 2.13.0, triton 3.9.0, Python 3.11.9; commit 0123456789ab."
    assert text.startswith(f"- cpu: {first}\n")
    of_a_copy = ["2.20 ms", "3.64", "50.0 % [50.0, 50.0]"]  # 8 MB in 2.2 ms
    assert row(text, "renoise") == ["renoise", "9x9", "64", "float32", *of_a_copy]
    of_a_product = ["4.40 ms", "0.909", "25.0 % [25.0, 25.0]", "2.00 [2.00, 2.00]"]  # 4 GFLOP in 4.4 ms
    assert row(text, "attention")[4:] == of_a_product
    assert row(text, "Even Pixels", "64")[3:] == ["10.0 ms a tick", "10.0 % [8.00, 12.0]"]
    largest = ["97,617 [96,195, 98,613]", "10.2 us", "36.2 MiB", "411 ms"]
    assert row(text, "4x4 transformer", "float32", "batch", "4,096")[-4:] == largest
    assert row(text, "Even Pixels", "8", "float32", "4 of 75")[4:-1] == [
        "125 ms a chain-iteration",
        "5.00 [4.97, 5.05]",
        "2.00 [2.00, 2.00]",
    ]
    assert "per-pixel" not in text  # nobody measured it, so it has no column


def test_several_files_say_which_is_which_and_whether_checks_passed(cpu, gpu, tmp_path, capsys):
    outcomes = {
        name: {"passed": False, "summary": f"{number} failed"} for name, number in (("checks", 1), ("bench", 2))
    }
    bad = made_up.write(tmp_path / "bad.json", [made_up.step("cuda")], **made_up.GPU, **outcomes)
    none = made_up.write(tmp_path / "none.json", [made_up.step("cuda")], **made_up.GPU)
    halted = {"bench": {"passed": True, "stopped": True, "summary": "KeyboardInterrupt"}}
    stopped = made_up.write(tmp_path / "stopped.json", [made_up.step("cuda")], **made_up.GPU, **halted)
    report.main([str(path) for path in (cpu, gpu, bad, none, stopped)])
    text = capsys.readouterr().out
    assert "- gpu: A GPU (driver 600.1, CUDA 13.0), A Processor" in text
    lines = {line[2:].partition(":")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert lines["gpu"].endswith("GPU checks passed (30 passed).")
    failed = "**GPU CHECKS FAILED (1 failed): no figure is a claim.** **BENCHMARKS FAILED (2 failed).**"
    assert lines["bad"].endswith(failed)
    assert lines["none"].endswith("**The tests that need a GPU were not run before.**")
    assert lines["stopped"].endswith(" The run was stopped before its end (KeyboardInterrupt).")
    assert "checks" not in lines["cpu"]
    assert row(text, "gpu", "renoise")[2:5] == ["9x9", "64", "float32"]


def test_benchmarks_of_another_group_are_not_forgotten(tmp_path, capsys):
    other = made_up.benchmark("test_new", "a new group", [0.5], against={"before": [1.0]}, unit="calls")
    report.main([str(made_up.write(tmp_path / "new.json", [other]))])
    assert row(capsys.readouterr().out, "test_new") == ["test_new", "500 ms a call", "2.00 [2.00, 2.00] before"]


def test_targets_are_met_missed_or_not_measured(tmp_path):
    wanted = {"one at a time": 4, "batched": 8, "compiled": 2, "outside_share": 0.03, "waits": 0}
    reached = {"outside_share": [0.01, 0.02, 0.04], "waits": 1, "targets": wanted}
    path = made_up.write(tmp_path / "file.json", [made_up.baselines(**reached)])
    found = targets.targets(records.read(path).records)
    assert [each.met for each in found] == [True, False, None, True, False]
    assert found[0].name == "Even Pixels, 8 chains: against one at a time"
    assert [each.wanted for each in found[1:4]] == ["at least 8 times", "at least 2 times", "at most 3 %"]
    assert [each.measured for each in found[1:]] == ["2.00 [2.00, 2.00]", "", "2.00 % [1.00, 4.00]", "1.00"]
    bare = records.Record("x", "step", [1.0], {"against": {}, "unit": "ticks", "targets": {"waits": 0}})
    assert targets.targets([bare])[0].met is None


def test_the_summary_is_short_and_aligned(cpu):
    measured = records.read(cpu).records
    text = report.summary(measured)
    assert text.startswith("baselines: speed-up over ..., median [quartiles]\n")
    assert "  Even Pixels, 8 chains  5.00 [4.97, 5.05] one at a time, 2.00 [2.00, 2.00] batched\n" in text
    assert "  Even Pixels, 64 chains  0.900 [0.900, 0.900] network, 10.0 % [8.00, 12.0] outside the network\n" in text
    assert "  renoise, 9x9, 64 chains    0.500 [0.500, 0.500] copy, 3.64 GB/s\n" in text
    assert "990 (1) to 97,617 (4,096) chain-iterations/s, at most 36.2 MiB\n" in text
    assert text.endswith("5.00 [4.97, 5.05] (at least 4 times): met")
    many = report.summary(measured * 30).splitlines()
    assert len(many) <= report.MOST_LINES
    assert any("more ratios" in line for line in many)


# ------------------------------------------------------------------------------------------------- pictures, README


def test_pictures_are_written_of_what_there_is(cpu, gpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "pictures"
    report.main([str(cpu), str(gpu), "--plots", str(folder)])
    written = {path.stem: path.read_bytes() for path in folder.iterdir()}
    assert set(written) == {"throughput", "time", "memory", "roofline"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in written.values())
    few = made_up.write(tmp_path / "few.json", [made_up.step()])
    report.main([str(few), "--plots", str(tmp_path / "none")])
    assert capsys.readouterr().out.endswith("Pictures: nothing to draw\n")
    assert list((tmp_path / "none").iterdir()) == []


def test_the_section_goes_into_the_readme_and_can_be_found_there(cpu, gpu, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- performance -->\nold figures\n<!-- /performance -->\nafter\n")
    for paths in ([cpu], [cpu, gpu], [cpu]):
        report.main([*map(str, paths), "--readme", str(readme)])
        section = report.readme_section([records.read(path) for path in paths])
        expected = f"before\n<!-- performance -->\n{section}\n<!-- /performance -->\nafter\n"
        assert readme.read_text() == expected


def test_the_section_says_what_was_measured_where(cpu, gpu):
    on_cpu, on_gpu = map(records.read, (cpu, gpu))
    section = report.readme_section([on_cpu])
    assert section.startswith("Measured at 0123456789ab on A Processor, 2 cores, threads: 1, torch 2.13.0.\n")
    assert row(section, "Even Pixels")[3:] == ["5.00 [4.97, 5.05]", "2.00 [2.00, 2.00]"]
    batches = [line.split(" | ")[2] for line in section.splitlines() if line.startswith("| 4x4 transformer")]
    assert batches == ["1", "16", "256", "4,096"]
    assert "of its time: 10.0 % [8.00, 12.0] for Even Pixels, 64 chains." in section
    assert section.endswith("Nothing here was measured on a GPU yet.")
    both = report.readme_section([on_cpu, on_gpu])
    groups = "operations and end to end; not yet: step and baselines."
    assert both.endswith(f"On a GPU (A GPU) these groups were measured: {groups}")


# ------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        report.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_file_that_is_none_of_these_is_an_error(cpu, tmp_path, capsys):
    assert "No such file" in fails(capsys, tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "is not what `pytest bench"),
        (json.dumps({"idle": []}), "KeyError: 'machine_info'"),
    ):
        bad.write_text(text)
        assert said in fails(capsys, cpu, bad)
        assert said in fails(capsys, "--compare", cpu, bad)
    whole = json.loads(cpu.read_text())
    del whole["benchmarks"][0]["extra_info"]["first_call"]
    bad.write_text(json.dumps(whole))
    assert "KeyError: 'first_call'" in fails(capsys, bad)
    made_up.write(bad, [made_up.step()] * 2)
    assert "several benchmarks of one name: test_outside" in fails(capsys, bad)


DAMAGE = {
    "no rounds": lambda each: each["stats"].update(data=[]),
    "rounds of one side": lambda each: each["stats"]["data"].append(1.0),
    "a time of nothing": lambda each: each["stats"]["data"].__setitem__(0, 0.0),
    "NaN": lambda each: each["stats"]["data"].__setitem__(0, float("nan")),
    "text": lambda each: each["stats"]["data"].__setitem__(0, "1"),
    "no units": lambda each: each["extra_info"].update(units=0),
    "no check": lambda each: each["extra_info"].update(check=None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_an_error(name, tmp_path):
    made = made_up.benchmark("it", "baselines", [1.0, 2.0], against={"batched": [2.0, 3.0]}, subject="x", batch=1)
    assert records.read(made_up.write(tmp_path / "whole.json", [made])).records
    DAMAGE[name](made)
    with pytest.raises(records.Unreadable, match=r"damaged\.json"):
        records.read(made_up.write(tmp_path / "damaged.json", [made]))
    with pytest.raises(records.Unreadable, match="holds no benchmarks"):
        records.read(made_up.write(tmp_path / "empty.json", []))


def test_options_that_do_not_go_together_are_an_error(cpu, capsys):
    for arguments in ((), (cpu, "--compare", cpu, cpu), ("--compare", cpu, cpu, "--plots", "x")):
        assert "or --compare OLD.json NEW.json alone" in fails(capsys, *arguments)


@pytest.mark.parametrize("text", ["none", "<!-- /performance --><!-- performance -->", "<!-- performance -->" * 2])
def test_a_readme_without_its_markers_is_an_error_and_stays(cpu, tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert "once each and in this order" in fails(capsys, cpu, "--readme", readme)
    assert readme.read_text() == text
    assert "No such file" in fails(capsys, cpu, "--readme", tmp_path / "none.md")


# ------------------------------------------------------------------------------------------------- words, scripts


def test_numbers_in_words():
    assert [words.short(x) for x in (0, 0.01234, 1.0, 99.96, 12345.6)] == [
        "0",
        "0.0123",
        "1.00",
        "100.0",
        "12,346",
    ]
    assert [words.duration(x) for x in (2.5, 0.0125, 3e-6)] == ["2.50 s", "12.5 ms", "3.00 us"]
    assert [words.binary(x) for x in (12, 2**10, 3 * 2**30)] == ["12 bytes", "1.00 KiB", "3.00 GiB"]
    assert [words.listed(x) for x in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_script_measures_writes_and_prints_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out.json"

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["script.py", *map(str, arguments)])
        script.run("What it does.", lambda boards: {"boards": boards}, report_it, boards=boards)
        return capsys.readouterr().out

    def report_it(results: dict) -> str:
        return f"{results['boards']} boards at {results['environment']['commit']}"

    boards = {"type": script.at_least(2), "default": 5}
    assert run().startswith("5 boards at ")
    printed = run("--boards", 3, "--out", out)
    assert list(tmp_path.rglob("*")) == [out.parent, out]
    assert printed == run("--report", out)
    foreign = tmp_path / "foreign.json"
    foreign.write_text("{}")
    for wrong in (
        ["--boards", 1],
        ["--boards", "two"],
        ["--report", tmp_path / "none.json"],
        ["--report", __file__],
        ["--report", foreign],
        ["--out", tmp_path],
        ["--out", foreign / "out.json"],
    ):
        with pytest.raises(SystemExit) as error:
            run(*wrong)
        assert error.value.code == 2
