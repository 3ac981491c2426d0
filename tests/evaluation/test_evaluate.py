import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ipr_fast import generate_batch, random_patches, refine_batch
from ipr_fast.evaluation import intervals
from ipr_fast.evaluation.evaluate import Trajectory, describe, evaluate, follow, many, summarise

TASK = SimpleNamespace(noun="image", adjective="bright")


class Brightness(NamedTuple):
    """What a made-up judge says of images: those are good that are bright on the whole."""

    bright: Tensor
    dark_pixels: Tensor
    value_std: Tensor

    @property
    def good(self) -> Tensor:
        return self.bright

    def measures(self) -> dict[str, Tensor]:
        return {"dark_pixels": self.dark_pixels, "value_std": self.value_std}


def judge(images):
    return Brightness(images.mean((1, 2, 3)) > 0, (images < 0).sum((1, 2, 3)), images.std((1, 2, 3)))


def made_up(good, dark):
    """A trajectory from a row of outcomes and one of numbers for each iteration."""
    rows = zip(torch.tensor(good, dtype=torch.bool), torch.tensor(dark), strict=True)
    return Trajectory([Brightness(row, numbers, numbers / 8) for row, numbers in rows])


BEFORE = [True, True, False, False, False]
AFTER = [True, False, True, True, False]
TRAJECTORY = made_up([BEFORE, [False] * 5, AFTER], [[0, 1, 2, 3, 4], [4, 4, 4, 4, 4], [1, 0, 0, 0, 0]])


# ------------------------------------------------------------------------------------------------------------ following


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_following_judges_what_generating_and_refining_give(model, ratio):
    seen = []
    trajectory = follow(model, judge, 6, 3, ratio=ratio, seed=7, watch=seen.append)
    wanted = [generate_batch(6, model=model, seed=7)]
    wanted += [refine_batch(wanted[0], random_patches(ratio), i, model=model, seed=7) for i in (1, 2, 3)]
    assert len(seen) == len(trajectory.reports) == 4
    for report, images, same in zip(trajectory.reports, seen, wanted, strict=True):
        assert torch.equal(images, same)
        assert isinstance(report, Brightness)
        for field, own in zip(report, judge(same), strict=True):
            assert torch.equal(field, own)
    assert not torch.equal(seen[0], seen[1])
    assert trajectory.good.shape == (4, 6)
    assert trajectory.good.dtype == torch.bool
    assert torch.equal(trajectory.good[2], judge(wanted[2]).bright)
    assert list(trajectory.measures()) == ["dark_pixels", "value_std"]
    assert torch.equal(trajectory.measures()["dark_pixels"], torch.stack([judge(x).dark_pixels for x in wanted]))


def test_following_depends_on_the_seed(model):
    a, b, c = (follow(model, judge, 4, 1, seed=seed).measures()["value_std"] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_following_no_iterations_judges_the_first_pass(model):
    trajectory = follow(model, judge, 3, 0)
    assert len(trajectory.reports) == 1
    assert torch.equal(trajectory.reports[0].value_std, judge(generate_batch(3, model=model)).value_std)


@pytest.mark.parametrize("shape", [(5, 16), (5, 4, 4)])
def test_known_patches_stay_and_the_others_fit_them(model, finished, shape):
    known, values, seen = torch.zeros(5, 16, dtype=torch.bool), finished[:5], []
    known[:, :6] = True
    known[4] = True  # nothing to regenerate
    follow(model, judge, 5, 2, seed=3, known=known.view(shape), known_values=values, watch=seen.append)
    wanted = generate_batch(5, model=model, seed=3, known=known, known_values=values)
    assert torch.equal(seen[0], wanted)
    assert torch.equal(seen[2], refine_batch(wanted, random_patches(0.25), 2, model=model, seed=3, known=known))
    given = model.grid.to_patches(values)[known]
    for images in seen:
        assert torch.equal(model.grid.to_patches(images)[known], given)
    assert not torch.equal(seen[0], generate_batch(5, model=model, seed=3))


def test_progress_is_told_only_when_asked_for(model, capsys):
    follow(model, judge, 2, 1)
    assert capsys.readouterr().err == ""
    follow(model, judge, 2, 1, progress=True)
    said = capsys.readouterr().err
    assert "generate" in said
    assert "refine" in said


def test_evaluating_is_following_and_summarising(model):
    task = SimpleNamespace(noun="image", adjective="bright", judge=lambda: judge)
    assert evaluate(task, model, 5, 2, seed=2) == summarise(follow(model, judge, 5, 2, seed=2), task)


# ------------------------------------------------------------------------------------------------------------- counting


def test_a_summary_counts_and_takes_means():
    results = summarise(TRAJECTORY, TASK)
    before, after = torch.tensor(BEFORE), torch.tensor(AFTER)
    assert results == {
        "images": 5,
        "bright_before": 2,
        "bright_after": 3,
        "share_before": intervals.share(before),
        "share_after": intervals.share(after),
        "gain": intervals.paired_gain(before, after),
        "fixed": 2,
        "broken": 1,
        "bright_by_iteration": [2, 0, 3],
        "mean_dark_pixels_by_iteration": [2.0, 4.0, 0.2],
        "mean_value_std_by_iteration": [0.25, 0.5, 0.025],
    }
    assert results["gain"].value == 0.2


def test_a_summary_can_be_stored():
    results = summarise(TRAJECTORY, TASK)
    stored = json.loads(json.dumps(results))
    assert stored["share_before"] == list(results["share_before"])
    assert {name: stored[name] for name in ("images", "fixed", "broken")} == {"images": 5, "fixed": 2, "broken": 1}


def test_the_words_for_a_summary():
    results = summarise(TRAJECTORY, TASK)
    before, after, gain = (results[name] for name in ("share_before", "share_after", "gain"))
    assert describe(results, TASK, 2) == [
        f"  after one pass            2 of 5 bright   {before.percent()}",
        f"  after 2 iterations        3 of 5 bright   {after.percent()}",
        f"  gain                   {gain.points()}   (paired; intervals are 95 %)",
        "  2 images fixed, 1 broken",
        "  dark pixels            2 before, 0.2 after, on average",
        "  value deviation        0.25 before, 0.025 after, on average",
    ]


def test_the_words_for_one_iteration_and_one_image():
    lines = describe(summarise(made_up([[False, True], [True, True]], [[0, 0], [0, 0]]), TASK), TASK, 1)
    assert lines[1].startswith("  after 1 iteration         2 of 2 bright   100.0 %")
    assert lines[3] == "  1 image fixed, 0 broken"


def test_many():
    assert [many(count, "board") for count in (0, 1, 2)] == ["0 boards", "1 board", "2 boards"]
