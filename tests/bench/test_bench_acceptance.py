"""bench/acceptance.py, on a few chains."""

import json

import acceptance


def test_it_measures_and_reports(tmp_path, capsys, monkeypatch):
    out = tmp_path / "acceptance.json"
    subjects = {"4x4 boards": ("digit-sudoku-4x4", (2,)), "tokens": ("token-sudoku-9x9", (1,))}
    monkeypatch.setattr(acceptance, "SUBJECTS", subjects)
    monkeypatch.setattr("sys.argv", ["acceptance.py", "--iterations", "1", "--out", str(out)])
    acceptance.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["subject"], row["keep_best"]) for row in rows] == [
        (name, best) for name in subjects for best in (False, True)
    ]
    assert all(0 < row["share"][0] < 1 for row in rows)
    printed = capsys.readouterr().out
    assert "| 4x4 boards | 2 |" in printed
    monkeypatch.setattr("sys.argv", ["acceptance.py", "--report", str(out)])
    acceptance.main()
    assert capsys.readouterr().out == printed
