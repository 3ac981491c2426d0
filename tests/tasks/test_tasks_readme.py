"""The README of tasks/: its task runs, from training samples to judged ones."""

import re
from pathlib import Path

import torch

from ipr_fast.models import PatchTransformerConfig
from ipr_fast.tasks.catalog import TASKS, make_task

README = (Path(__file__).parents[2] / "ipr_fast/tasks/README.md").read_text()


def test_its_task_is_trained_and_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task, run = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace = {"__name__": "readme"}
    exec(compile(task, "tasks/README.md", "exec"), namespace)
    half_white = namespace["HalfWhite"]()
    draw = [half_white.sample(50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert half_white.judge()(draw[0]).good.all()
    one_more = draw[0].clone()
    one_more[:, :, :4, :4] *= -1
    assert half_white.judge()(one_more).imbalance.tolist() == [1] * 50
    exec(compile(run, "tasks/README.md", "exec"), namespace)
    assert isinstance(half_white.config, PatchTransformerConfig)
    assert "of 16 balanced" in capsys.readouterr().out


def test_its_table_of_tasks_is_the_catalog():
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| (\d+) \|", README, flags=re.MULTILINE)

    def row(task):
        if hasattr(task, "length"):
            return task.name, f"{task.length} tokens", str(task.length)
        return task.name, "x".join(map(str, task.grid.sample_shape)), str(task.grid.num_patches)

    assert rows == [row(make_task(name)) for name in TASKS]
