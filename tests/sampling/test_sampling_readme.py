"""The README of sampling/: its code runs, its schedules and streams are the package's."""

import re
from pathlib import Path

import pytest
import torch
from test_few_steps import KEPT

from ipr_fast import PatchGrid, Prediction, Schedule, reference
from ipr_fast.kernels import philox

README = (Path(__file__).parents[2] / "ipr_fast/sampling/README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_its_sequences_and_video_are_refined():
    namespace = {}
    (block,) = (block for block in BLOCKS if "PatchGrid.of" in block)
    exec(compile(block, "sampling/README.md", "exec"), namespace)
    video, x, given = (namespace[name] for name in ("video", "x", "given"))
    assert (namespace["sequence"].num_patches, video.num_patches) == (12, 16)
    assert x.shape == (4, 3, 8, 16, 16)
    assert torch.equal(x[:, :, :2], given[:, :, :2])  # what is known stays
    known, others = video.to_patches(x).split([4, 12], dim=1)
    assert (others.std() < known.std()).all()  # means vary less


def test_its_tokens_are_refined():
    namespace = {}
    (block,) = (block for block in BLOCKS if "TokenSchedule" in block)
    exec(compile(block, "sampling/README.md", "exec"), namespace)
    assert namespace["x"].shape == (4, 81)
    assert namespace["x"].max() < 10


def test_its_rewards_are_those_of_the_samples():
    namespace = {}
    (block,) = (block for block in BLOCKS if "Metropolis" in block)
    exec(compile(block, "sampling/README.md", "exec"), namespace)
    assert torch.equal(namespace["accept"].last.reward, -namespace["judge"](namespace["x"]).violations.double())


def test_its_policies_run_and_choose_what_they_say():
    namespace = {}
    for block in BLOCKS:
        if any(name in block for name in ("TokenSchedule", "Metropolis", "PatchGrid.of")):
            continue
        exec(compile(block, "sampling/README.md", "exec"), namespace)
        x, refined = namespace["x"], namespace["refined"]
        changed = PatchGrid(1, 32, 32, 8).to_patches(x != refined).any(-1).unflatten(1, (4, 4))
        if "RandomRow" in namespace:
            assert (changed == changed.all(2, keepdim=True)).all()  # whole rows
            assert changed.any(2).sum(1).unique().tolist() == [1, 2]  # of two iterations
        else:
            assert changed.all()  # by both colours together


class Still:
    """Predicts no movement."""

    grid = PatchGrid(1, 2, 2, 1)

    def __call__(self, patches, levels, active=None):
        return Prediction(torch.zeros(*levels.shape, 1))


@pytest.mark.parametrize(("column", "overlap"), [(0, 0.0), (1, 0.5), (2, 1.0)])
def test_its_schedules_are_the_references(column, overlap):
    drawing = next(block for block in re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL))
    heads, *rows = [re.split(r" {3,}", line) for line in drawing.splitlines()]
    schedule, active = Schedule(3, overlap), torch.ones(4, dtype=torch.bool)
    _, levels = reference.regenerate(
        Still(), torch.zeros(4, 1), active, schedule, stochasticity=0.0, noise=lambda step: torch.zeros(4, 1)
    )
    block = schedule.block(4)
    assert heads[column] == f"overlap {overlap}, L = {block}"
    drawn = torch.tensor([[int(digit) for digit in row[column].split()] for row in rows])
    assert torch.equal(drawn, (levels.T * block).round().long())


def test_its_streams_are_those_of_philox():
    table = {name: int(stream) for stream, name in re.findall(r"^\| (\d) \| `(STREAM_\w+)` \|", README, flags=re.M)}
    assert table == {name: value for name, value in vars(philox).items() if name.startswith("STREAM_")}


def test_its_shares_of_the_covariance_are_those_of_the_test():
    shares = " | ".join(f"{share:.2f}" for share in KEPT.values())
    assert f"| share kept | {shares} |" in README
