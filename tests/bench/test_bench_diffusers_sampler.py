"""bench/diffusers_sampler.py, on small videos."""

import json

import pytest

pytest.importorskip("diffusers", reason="needs the extra diffusers", exc_type=ImportError)

import diffusers_sampler


def test_both_samplers_are_timed_where_they_agree(tmp_path, monkeypatch, capsys):
    out = tmp_path / "diffusers.json"
    for name, value in {"CHAINS": (1, 2), "FRAMES": 2, "SIDE": 4, "STEPS": 2}.items():
        monkeypatch.setattr(diffusers_sampler, name, value)
    monkeypatch.setattr("sys.argv", ["diffusers_sampler.py", "--rounds", "1", "--out", str(out)])
    diffusers_sampler.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["chains"], row["scale"]) for row in rows] == [(1, 1.0), (1, 5.0), (2, 1.0), (2, 5.0)]
    assert all(row["apart"] < diffusers_sampler.CLOSE and row["faster"][1] > 0 for row in rows)
    assert "| 2 | 5 |" in capsys.readouterr().out
    monkeypatch.setattr(diffusers_sampler, "CLOSE", 0.0)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        diffusers_sampler.main()
