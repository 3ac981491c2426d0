"""bench/waves.py, on a few boards."""

import json

import pytest
import waves


def test_it_counts_times_and_reports(tmp_path, capsys, monkeypatch):
    out = tmp_path / "waves.json"
    monkeypatch.setattr("sys.argv", ["waves.py", "--boards", "6", "--rounds", "2", "--out", str(out)])
    waves.main()
    results = json.loads(out.read_text())
    assert len(results["idle"]) == 8
    for row in results["idle"]:
        unordered, ordered, few, one_by_one = row["idle"]
        assert 0.12 < unordered < 0.18
        assert unordered + 1e-9 >= ordered >= few >= one_by_one == 0
        assert few < 0.05
    assert [row["task"] for row in results["timed"]] == ["refine", "generate"][::-1]
    printed = capsys.readouterr().out
    assert waves.report(results) in printed
    monkeypatch.setattr("sys.argv", ["waves.py", "--report", str(out)])
    waves.main()
    assert capsys.readouterr().out.strip() == waves.report(results)


def test_it_wants_two_rounds(monkeypatch):
    monkeypatch.setattr("sys.argv", ["waves.py", "--rounds", "1"])
    with pytest.raises(SystemExit):
        waves.main()
