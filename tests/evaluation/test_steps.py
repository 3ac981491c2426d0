"""What the model calls inside an iteration buy."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import randomise

from ipr_fast import Schedule, models, save_model
from ipr_fast.cli.main import main
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.steps import fit, frechet_distance, measure_steps
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches, sweep_patches
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def model():
    config = models.PatchTransformerConfig(
        image_size=32, patch_size=8, channels=1, width=16, depth=1, num_heads=1, refine_schedule=(4, 0.5)
    )
    return randomise(models.PatchTransformer(config), seed=0)


@pytest.fixture(scope="module")
def results(model):
    return measure_steps(DigitSudoku(4), model, "random", 12, iters=3, clues=(2, 9), seed=1)


def test_rows_are_those_of_the_library_calls(model, results):
    task, rows = DigitSudoku(4), {row["name"]: row for row in results["steps"]}
    assert list(rows) == [
        *("one pass", "the model's schedule", "a sweep of 10", "3 steps", "3 steps, then a sweep of 10"),
        *("2 steps", "2 steps, then a sweep of 10", "1 step", "1 step, then a sweep of 10"),
        "the model's schedule, for as many calls",
    ]
    known, values = draw_clues(task, 12, (2, 9), 1)
    free = (~known).sum(1)
    chosen = (free // 4).clamp_min(1)
    x = generate_batch(12, model=model, known=known, known_values=values, seed=1)
    options = {"model": model, "known": known}
    x = refine_batch(x, random_patches(), 3, schedule=Schedule(1, 1.0), seed=1, **options)
    sweep = int((-(-free // chosen)).max())
    assert sweep > 4  # more than ceil(1 / alpha) where the number is no multiple
    x = refine_batch(x, sweep_patches(), sweep, schedule=Schedule(10, 1.0), seed=2, **options)
    row = rows["1 step, then a sweep of 10"]
    assert row["means"]["violations"][0] == pytest.approx(task.judge()(x).violations.double().mean())
    assert row["calls"] == pytest.approx(3 * free.double().mean() + 3 * 1 + sweep * 10)
    cells = model.grid.to_patches(x)[~known]
    boards = task.sample(12, torch.Generator().manual_seed(2))
    data = model.grid.to_patches(boards)[~known]
    assert row["distance"] == pytest.approx(frechet_distance(fit(cells), fit(data)), rel=1e-9)
    assert rows["one pass"]["gain"][0] == 0
    assert [row["iterations"] for row in results["steps"]][:-1] == [0, 3, sweep, *(3, 3 + sweep) * 3]


def test_the_last_row_has_the_fewest_iterations_with_as_many_calls(model, results):
    rows = {row["name"]: row for row in results["steps"]}
    last, most = rows["the model's schedule, for as many calls"], rows["3 steps, then a sweep of 10"]["calls"]
    iterations, begin = last["iterations"], rows["one pass"]["calls"]
    assert most <= last["calls"] < most + (last["calls"] - begin) / iterations
    known, values = draw_clues(DigitSudoku(4), 12, (2, 9), 1)
    x = generate_batch(12, model=model, known=known, known_values=values, seed=1)
    x = refine_batch(x, random_patches(), iterations, model=model, known=known, seed=1)
    violations = DigitSudoku(4).judge()(x).violations.double().mean()
    assert last["means"]["violations"][0] == pytest.approx(violations)


def test_the_report_has_a_row_for_each_arm(results):
    results = json.loads(json.dumps(results))
    assert report(results).startswith("| steps | iterations | NFE | valid boards | gain over one pass | ")
    assert all(f"| {row['name']} | " in report(results) for row in results["steps"])
    assert f"of other data {results['data_distance']:.2g}." in report(results)
    results["steps"][1]["calls"] = 10308.4
    assert " | 10,308 | " in report(results)


def test_data_are_near_to_data_and_blurred_data_are_not(results):
    task = DigitSudoku(4)
    first, second = (task.sample(500, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    cells, others = (boards.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 64) for boards in (first, second))
    near = frechet_distance(fit(cells), fit(others))
    assert near < 0.2
    assert frechet_distance(fit(0.8 * cells + 0.2 * cells.mean(0)), fit(others)) > 3 * near
    assert 0 < results["data_distance"] < results["steps"][0]["distance"]


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_the_distance_of_gaussians_with_commuting_covariances_is_known(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    scales = torch.rand(2, dim, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    a, b = ((mean, basis * scale**2 @ basis.T) for mean, scale in zip(means, scales, strict=True))
    known = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(known.item(), abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_the_distance_of_any_gaussians_is_that_of_the_definition(seed, dim):
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), the root's trace by the eigenvalues of A B, which is not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    roots = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    first, second = roots @ roots.mT
    root = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    known = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * root
    assert frechet_distance((means[0], first), (means[1], second)) == pytest.approx(known.item(), abs=1e-4, rel=1e-5)


def test_patches_that_never_vary_have_a_distance():
    constant = fit(torch.ones(4, 3))
    assert frechet_distance(constant, fit(torch.zeros(5, 3))) == pytest.approx(3)


def test_the_command_measures_other_images_too(tmp_path, capsys):
    arguments = ["evaluate", "steps", "--quiet", "--count", "2", "--iters", "1"]
    config = models.PatchTransformerConfig(image_size=32, patch_size=4, channels=3, width=8, depth=1, num_heads=1)
    weights, out = str(tmp_path / "even.safetensors"), tmp_path / "steps.json"
    save_model(randomise(models.PatchTransformer(config), seed=0), weights)
    assert main([*arguments, "--model", weights, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == report(json.loads(out.read_text()))
    assert json.loads(out.read_text())["model"] == weights
    assert EvenPixels().noun in report(json.loads(out.read_text()))
    for options, error in [
        (["--clues", "16", "16"], "clues must leave two cells to generate, got 0 in 2 samples"),
        (["--model", "token-sudoku-9x9"], "steps is measured on images, got a model of token-sudoku-9x9"),
        (["--arms", "fixed"], "--arms is not an option of steps, which has model, count, clues, iters"),
    ]:
        assert main([*arguments, *options]) == 1
        assert error in capsys.readouterr().err
