"""The results of experiments in a README, from the JSON files of their reports."""

import json

import pytest

from ipr_fast.cli.main import main
from ipr_fast.evaluation.scale.readme import read_summary, results_section
from ipr_fast.evaluation.scale.report import summary_markdown
from ipr_fast.outputs import replace_sections


def arm(name, *points):
    """An arm whose points have (iteration, good of 200, model calls)."""
    return {
        "name": name,
        "points": [
            {
                "iteration": iteration,
                "samples": 200,
                "good": good,
                "share": [good / 200, 0.1, 0.9],
                "model_calls": calls,
                "evaluations": 10 * calls,
                "reward_calls": 0,
                "means": {"violations": [1.5, 1.0, 2.0]},
            }
            for iteration, good, calls in points
        ],
    }


def comparison(name, rival, fixed, broken):
    gain = [(fixed - broken) / 200, -0.01, 0.2]
    return {"arm": name, "rival": rival, "samples": 200, "gain": gain, "fixed": fixed, "broken": broken, "p": 0.5}


SUMMARY = {
    **{"experiment": "mine", "title": "Mine", "task": "t", "model": "m", "samples": 40, "clues": [0, 0]},
    **{
        "noun": "board",
        "adjective": "valid",
        "judge": "judged by a reader",
        "seeds": [0, 1, 2, 3, 4],
        "shards": [5, 5],
    },
    **{"seconds": 10.0, "outside_engine": 0.01, "commit": "abc", "torch": "2.13.0", "processor": "a CPU"},
    "arms": [arm("pass", (0, 80, 20)), arm("IPR", (0, 80, 20), (5, 100, 1060)), arm("longer", (0, 90, 1000))],
    "comparisons": [
        comparison("IPR", None, 30, 10),
        comparison("longer", "pass", 25, 15),
        comparison("IPR", "longer", 40, 30),
    ],
}
ROWS = """\
| `mine --count 40` | IPR | 200 | 5 | 1,060 | 40.0 % | 50.0 % [10.0, 90.0] | +10.0 points [-1.0, +20.0] | 30 / 10 |
|  | longer | 200 | 0 | 1,000 | 40.0 % | 45.0 % [10.0, 90.0] | +5.0 points [-1.0, +20.0] | 25 / 15 |
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "mine.json"


def test_a_row_for_each_arm_that_is_compared_with_its_first_comparison(file, capsys):
    assert main(["report", str(file)]) == 0
    printed = capsys.readouterr().out
    assert ROWS in printed
    assert printed.rstrip().endswith(
        "Intervals 95 %, gains paired by sample. Judged by a reader. Measured at abc on a CPU, torch 2.13.0."
    )


def test_experiments_of_several_commits_name_theirs():
    other = {**SUMMARY, "experiment": "other", "commit": "def", "judge": ""}
    said = results_section([SUMMARY, other, {**SUMMARY, "experiment": "third"}])
    assert "Measured at abc on a CPU, torch 2.13.0 (mine, third); at def on a CPU, torch 2.13.0 (other)." in said
    assert said.count("Judged by a reader.") == 1


def test_a_run_of_which_shards_are_left_is_named():
    left = {**SUMMARY, "shards": [3, 5]}
    assert results_section([left]).endswith(" torch 2.13.0. Unfinished: 3 of 5 shards are done.")
    other = {**SUMMARY, "experiment": "other"}
    assert results_section([left, other]).endswith(" mine: Unfinished: 3 of 5 shards are done.")
    assert "Unfinished" not in results_section([other])


def test_the_sections_of_a_readme_are_replaced(file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "# Title\n<!-- results -->\nold\n<!-- /results -->\n\nwords\n\n<!-- mine -->\n<!-- /mine -->\nend\n"
    )
    for _ in range(2):  # again: the same
        assert main(["report", str(file), "--readme", str(readme)]) == 0
        assert readme.read_text() == (
            f"# Title\n<!-- results -->\n{results_section([SUMMARY])}\n<!-- /results -->\n\nwords\n\n"
            f"<!-- mine -->\n{summary_markdown(SUMMARY)}\n<!-- /mine -->\nend\n"
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "the lines <!-- results --> and <!-- /results --> or <!-- mine --> and <!-- /mine -->, once each"),
        ("<!-- mine -->", "needs the lines <!-- mine --> and <!-- /mine -->, once each and in this order"),
        (
            "<!-- /mine --><!-- mine -->",
            "needs the lines <!-- mine --> and <!-- /mine -->, once each and in this order",
        ),
        ("<!-- mine --><!-- mine --><!-- /mine -->", "needs the lines <!-- mine -->"),
    ],
)
def test_a_file_without_markers_is_left_alone(tmp_path, text, said):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=said):
        replace_sections(tmp_path / "README.md", {"results": "new", "mine": "new"})
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a JSON file of `ipr-fast report`"),
        ("[]", "not a JSON file of `ipr-fast report`"),
        ('{"arms": []}', "it has no experiment, comparisons"),
        (json.dumps({**SUMMARY, "arms": 1}), r"x\.json: not a JSON file of `ipr-fast report` \(TypeError"),
        *(
            (json.dumps({key: value for key, value in SUMMARY.items() if key != name}), rf"\(KeyError\('{name}'\)\)")
            for name in ("judge", "noun", "shards")
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_summary(tmp_path / "x.json")


def test_a_report_of_folders_writes_no_readme(file, tmp_path, capsys):
    assert main(["report", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 1
    assert "--readme takes the JSON files of a report" in capsys.readouterr().err
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "--out is the folder for a report of folders" in capsys.readouterr().err
