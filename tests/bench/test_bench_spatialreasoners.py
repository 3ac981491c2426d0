"""bench/spatialreasoners_sampler.py, on tiny networks."""

import json

import pytest
import spatialreasoners_sampler


def test_it_measures_and_reports(tmp_path, capsys, monkeypatch):
    pytest.importorskip("baselines.spatialreasoners_models")
    out, tiny = tmp_path / "x.json", {"d_hid": 32, "depth": 1}
    unet = {"hid_dims": [32], "attention": [False], "num_blocks": 1, "time_embedding_dim": 32}
    monkeypatch.setattr(spatialreasoners_sampler, "NETWORKS", {"unet": unet, "dit": tiny})
    monkeypatch.setattr("sys.argv", ["spatialreasoners_sampler.py", "--rounds", "2", "--out", str(out)])
    spatialreasoners_sampler.main()
    rows = json.loads(out.read_text())["rows"]
    measured = [("unet", 1), ("unet", 1), ("unet", 8), ("unet", 8), ("dit", 1), ("dit", 8)]
    assert [(row["network"], row["chains"]) for row in rows] == measured
    printed = capsys.readouterr().out
    assert "| unet | 8 | SRMUNet |" in printed
    monkeypatch.setattr("sys.argv", ["spatialreasoners_sampler.py", "--report", str(out)])
    spatialreasoners_sampler.main()
    assert capsys.readouterr().out == printed
