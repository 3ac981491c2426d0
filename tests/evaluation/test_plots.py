"""Pictures of samples over the iterations: files of the size that their rows and columns take."""

import pytest
import torch

from ipr_fast.evaluation import budget_plot, plots
from ipr_fast.evaluation.budget_plot import plot_budgets

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def size_of(path):
    with image_module.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("side", [4, 9])
@pytest.mark.parametrize("has_clues", [True, False])
def test_boards_have_a_row_each_and_a_column_for_each_iteration(tmp_path, generator, side, has_clues):
    images = torch.rand(4, 3, 1, 8 * side, 8 * side, generator=generator) * 2 - 1
    violating = torch.rand(4, 3, side, side, generator=generator) < 0.2
    known = torch.rand(3, side * side, generator=generator) < 0.3 if has_clues else None
    plots.plot_boards(tmp_path / "a.png", images, violating, known, iterations=[0, 1, 3], chosen=[2, 0])
    plots.plot_boards(tmp_path / "b.png", images, violating, known, iterations=[0, 1, 2, 3], chosen=[0, 1, 2])
    (width, height), (wider, higher) = size_of(tmp_path / "a.png"), size_of(tmp_path / "b.png")
    assert (wider - width, higher - height) == pytest.approx((150 * 1.35, 150 * 1.35), abs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_and_three_channels_are_drawn(tmp_path, generator, channels):
    images = torch.randn(2, 2, channels, 16, 16, generator=generator)  # clamped to [-1, 1]
    good, measure = torch.tensor([[True, False], [True, True]]), ("imbalance", torch.rand(2, 2, generator=generator))
    plots.plot_images(tmp_path / "images.png", images, good, measure, iterations=[0, 1], chosen=[1])
    assert size_of(tmp_path / "images.png") == pytest.approx((150 * 3.9, 150 * 2.06), abs=1)


def test_the_share_of_good_samples_is_drawn_even_after_no_iteration(tmp_path):
    for iterations in (1, 5):
        good = torch.rand(iterations, 8, generator=torch.Generator().manual_seed(0)) < 0.5
        plots.plot_good(tmp_path / "curve.png", good, "valid boards", title="title")
        assert size_of(tmp_path / "curve.png") == (780, 480)


@pytest.mark.parametrize("samples", [1, 8])
def test_the_means_of_measures_are_drawn_side_by_side(tmp_path, generator, samples):
    """Even without an interval, of one sample, and after no iteration."""
    for iterations in (1, 5):
        measures = {name: torch.rand(iterations, samples, generator=generator) for name in ("a", "b", "c")}
        plots.plot_measures(tmp_path / "curves.png", measures, title="title")
        assert size_of(tmp_path / "curves.png") == pytest.approx((150 * 2.7 * 3, 150 * 2.6), abs=1)


def test_shares_are_drawn_against_the_model_calls_even_where_cells_are_missing(tmp_path):
    shares = [0.0, -0.0, 1e-17], [1.0, 0.9, 1.0], [0.3, 0.2, 0.5]
    cells = [{"budget": budget, "share": share} for budget, share in zip((40, 5, 81), shares, strict=True)]
    names = "one pass, confidence", "confidence and IPR, alpha 0.1", "ReMDM cap, confidence", "another"
    rows = [{"name": name, "cells": cells[: 1 + number]} for number, name in enumerate(names)]
    plot_budgets(tmp_path / "curve.png", {"adjective": "valid", "noun": "board", "rows": rows})
    assert size_of(tmp_path / "curve.png") == (1290, 690)


def test_budgets_of_guidance_are_passes_and_its_methods_are_told_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(budget_plot, "save_figure", lambda figure, path: drawn.append(figure))
    cells = [{"budget": 1, "share": [0.5, 0.4, 0.6]}]
    names = "best of N", "IPR", "IterRef, T = 0.5", "FK steering, T = 0.5", "SVDD"
    rows = [{"name": name, "cells": cells} for name in names]
    results = {"adjective": "valid", "noun": "board", "rows": rows, "multiples": [1], "pass_calls": 48.0}
    plot_budgets(tmp_path / "curve.png", results)
    (axis,) = drawn[0].axes
    assert axis.get_xlabel() == "passes of 48 model calls of a board at most"
    assert len({line[0].get_color() for line in axis.containers}) == len(names)
