"""The report of runs in shards: its numbers are those of the records, its page needs no other file."""

import json
import re
from dataclasses import replace

import pytest
import torch

from ipr_fast.cli.main import main
from ipr_fast.evaluation import intervals
from ipr_fast.evaluation.scale import folder, records
from ipr_fast.evaluation.scale.folder import RunFolder, Share
from ipr_fast.evaluation.scale.pages import Heading, Picture, Table, to_html, to_markdown
from ipr_fast.evaluation.scale.report import p_value, sentence
from ipr_fast.evaluation.scale.shards import shards_of
from ipr_fast.evaluation.scale.summary import compare_runs, kept_samples, summarise

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
from small_plans import PLAN, rows, run_file, write_plan

TEXT = PLAN + '\n[[compare]]\narm = "refined"\n\n[[compare]]\narm = "best of 2"\nwith = "one pass"\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a plan, and its report."""
    file = write_plan(tmp_path_factory.mktemp("plan"), TEXT)
    out = run_file(file, tmp_path_factory.mktemp("runs") / "first").path
    assert main(["report", str(out)]) == 0
    return out


def good(run, arm, iteration, seeds=(0, 1)):
    """Whether the samples are good, in the order of seeds and chains."""
    return torch.tensor([row[4] for row in rows(run) if row[0] in seeds and row[2:4] == (arm, iteration)])


def test_the_numbers_are_those_of_the_records(run):
    summary = json.loads((run / "report" / "first.json").read_text())
    assert summary["shards"] == [6, 6]
    arms = {arm["name"]: arm for arm in summary["arms"]}
    for name, last in (("one pass", 0), ("refined", 3), ("best of 2", 1)):
        point = arms[name]["points"][-1]
        expected = good(run, name, last)
        assert (point["iteration"], point["samples"], point["good"]) == (last, 20, int(expected.sum()))
        assert point["share"] == pytest.approx(intervals.share(expected))
        surplus = torch.tensor([row[5] for row in rows(run) if row[2:4] == (name, last)])
        assert point["means"]["imbalance"][0] == pytest.approx(surplus.double().mean().item())
        width = point["means"]["imbalance"][2] - point["means"]["imbalance"][0]
        assert width == pytest.approx(intervals.mean(surplus)[2] - intervals.mean(surplus)[0])
        assert arms[name]["by_seed"][1] == pytest.approx(intervals.share(good(run, name, last, (1,))))
    own, rival = summary["comparisons"]
    assert own["gain"] == pytest.approx(intervals.paired_gain(good(run, "refined", 0), good(run, "refined", 3)))
    changes = intervals.paired_changes(good(run, "one pass", 0), good(run, "best of 2", 1))
    assert (rival["fixed"], rival["broken"]) == (changes["fixed"], changes["broken"])
    assert rival["p"] == pytest.approx(intervals.mcnemar(rival["fixed"], rival["broken"]))
    assert arms["best of 2"]["points"][-1]["reward_calls"] == 2
    assert arms["best of 2"]["points"][-1]["model_calls"] == 2 * arms["one pass"]["points"][0]["model_calls"]


def test_the_page_has_all_in_itself(run):
    html = (run / "report" / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("data:image/png;base64,") == len(list((run / "report").glob("*.png"))) >= 2
    for words in ("A test", "Quality beside cost", "Compared sample by sample", "Seeds apart", "McNemar"):
        assert words in html
    markdown = (run / "report" / "report.md").read_text()
    assert all((run / "report" / name).exists() for name in re.findall(r"\]\(([\w.-]+\.png)\)", markdown))
    assert "| one pass | 0 | 2 | 192 | 0 | 20 |" in markdown


def test_two_runs_are_compared_sample_by_sample(run, tmp_path, capsys):
    text = TEXT.replace("iterations = 3", "iterations = 2").replace("samples = 10", "samples = 8")
    other = run_file(write_plan(tmp_path, text), tmp_path / "second").path
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both")]) == 0
    assert "both/report.html" in capsys.readouterr().out
    markdown = (tmp_path / "both" / "report.md").read_text()
    table = markdown.split("# first against second, sample by sample")[1]
    found = re.search(r"^\| refined \| second \| .* \| (\d+) / (\d+) \|", table, flags=re.MULTILINE)
    mine = torch.tensor([row[4] for row in rows(run) if row[2:4] == ("refined", 3) and row[1] < 8])
    changes = intervals.paired_changes(good(other, "refined", 2), mine)
    assert [int(found[1]), int(found[2])] == [changes["fixed"], changes["broken"]]


def test_an_unfinished_run_is_reported_as_such(tmp_path):
    out = run_file(write_plan(tmp_path, TEXT), tmp_path / "part", Share(1, 2)).path
    assert main(["report", str(out)]) == 0
    assert "Unfinished: 3 of 6 shards are done." in (out / "report" / "report.md").read_text()
    assert main(["evaluate", str(tmp_path / "plan.toml"), "--out", str(out), "--quiet", "--device", "cpu"]) == 0


def test_the_seeds_of_a_run_are_named(run):
    summary = json.loads((run / "report" / "first.json").read_text())
    assert "10 images for each of the seeds 0, 1; " in sentence(summary)
    assert "10 images of seed 0; " in sentence({**summary, "seeds": [0]})


def test_what_cannot_be_reported_is_told(tmp_path, capsys, run):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "not a folder of a run: it has no readable manifest.json" in capsys.readouterr().err
    (tmp_path / "empty" / "manifest.json").write_text((run / "manifest.json").read_text())
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "no shard is done yet" in capsys.readouterr().err
    shard = next(run.glob("*.parquet"))
    (tmp_path / "empty" / shard.name).write_bytes(shard.read_bytes()[:-9])
    assert main(["report", str(tmp_path / "empty")]) == 1
    error = capsys.readouterr().err
    assert f"{shard.name}: a damaged shard" in error
    assert "`ipr-fast evaluate`, makes it again" in error


def test_stored_samples_are_read_for_the_gallery_alone(run, monkeypatch):
    read, names = records.read_shard, []

    def spy(path, identity, num_rows, wanted=None):
        table = read(path, identity, num_rows, wanted)
        names.append(set(table.column_names))
        return table

    monkeypatch.setattr(folder, "read_shard", spy)
    opened = RunFolder.at(run)
    summarise(opened)
    costs = {"model_calls", "evaluations", "reward_calls"}
    assert len(names) == 6
    assert all(found == {"good", *costs, *(name for name in found if name.startswith("measure_"))} for found in names)
    names.clear()
    assert next(kept_samples(opened, "refined"))[2][3].shape == (4,)
    assert names == [{"sample", "good"}]


def test_texts_are_escaped_and_intervals_stay_whole():
    blocks = [
        Heading("a < b"),
        Table(["x", "<y>"], [["n", "1.0 % [0.5, 2.0]"]]),
        Picture("p.png", 'a "b"', b"png"),
        "&",
    ]
    html = to_html("t & u", blocks)
    assert "<title>t &amp; u</title>" in html
    assert "a &lt; b" in html
    assert "1.0\N{NO-BREAK SPACE}% [0.5,\N{NO-BREAK SPACE}2.0]" in html
    assert 'alt="a &quot;b&quot;"' in html
    assert (
        to_markdown(blocks)
        == '## a < b\n\n| x | <y> |\n| --- | ---: |\n| n | 1.0 % [0.5, 2.0] |\n\n![a "b"](p.png)\n\n&\n'
    )


def test_p_values_are_short_and_never_zero():
    assert [p_value(p) for p in (0.25, 2e-7, 0.0)] == ["0.25", "2e-07", "< 1e-99"]


def test_the_exact_test_of_mcnemar_is_binomial():
    assert intervals.mcnemar(0, 0) == intervals.mcnemar(3, 3) == 1
    assert intervals.mcnemar(7, 0) == pytest.approx(2 / 2**7)
    assert intervals.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert intervals.mcnemar(4, 5) == pytest.approx(1)
    assert 0 < intervals.mcnemar(500, 700) < 1e-7


def test_runs_with_other_shards_are_compared_by_chains_and_those_of_other_clues_are_not(run, tmp_path):
    same = run_file(write_plan(tmp_path, TEXT.replace("batch = 4", "batch = 5")), tmp_path / "same").path
    one, other = RunFolder.at(run), RunFolder.at(same)
    assert len(shards_of(one.plan)) != len(shards_of(other.plan))
    found = {row["arm"]: row for row in compare_runs(one, other)}
    assert set(found) == {"one pass", "refined", "best of 2"}
    for row in found.values():
        assert (row["samples"], row["fixed"], row["broken"]) == (20, 0, 0)
    other.plan = replace(other.plan, clues=(0, 1))
    assert compare_runs(one, other) == []
