"""bench/lanes.py, on a few chains."""

import json

import lanes


def test_it_measures_and_reports(tmp_path, capsys, monkeypatch):
    out = tmp_path / "lanes.json"
    monkeypatch.setattr(lanes, "SUBJECTS", {"4x4 boards": ("digit-sudoku-4x4", 100, (2, 6, 9))})
    monkeypatch.setattr("sys.argv", ["lanes.py", "--rounds", "2", "--share", "0.07", "--out", str(out)])
    lanes.main()
    (subject,) = json.loads(out.read_text())["subjects"]
    assert subject["chains"] == 7
    assert [row["lanes"] for row in subject["rows"]] == [2, 6, 7]
    assert subject["rows"][-1]["faster"] == [1.0, 1.0, 1.0]
    assert all(few["bytes"] < many["bytes"] for few, many in zip(subject["rows"], subject["rows"][1:], strict=False))
    printed = capsys.readouterr().out
    assert "| 7 4x4 boards | 2 |" in printed
    monkeypatch.setattr("sys.argv", ["lanes.py", "--report", str(out)])
    lanes.main()
    assert capsys.readouterr().out == printed
