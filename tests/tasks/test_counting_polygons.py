"""The task of Counting Polygons: what its images show, and what its judge says of them."""

import re

import pytest
import torch

from ipr_fast.evaluation.intervals import share_of
from ipr_fast.tasks.counting_polygons import CountingPolygons, CountingPolygonsSmall, PolygonsJudge, _report
from ipr_fast.tasks.polygons.drawing import VALUE, coverage
from ipr_fast.tasks.polygons.objects import find_objects
from ipr_fast.tasks.polygons.reader import OTHER, POLYGONS, ObjectReader, held_out_accuracy
from ipr_fast.tasks.polygons.train_reader import measure, spoiled, true_counts

TASK = CountingPolygons()
JUDGE = TASK.judge()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- the samples


def test_samples_fit_the_tasks_grid_and_follow_the_generator():
    draw = [TASK.sample(3, seeded(seed)) for seed in (0, 0, 1)]
    assert draw[0].shape[1:] == TASK.grid.sample_shape == (3, 128, 128)
    assert TASK.grid.num_patches == 256
    assert draw[0].dtype == torch.float32
    assert draw[0].abs().max() <= 1
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert TASK.sample(0, seeded(0)).shape == (0, 3, 128, 128)


def test_numbers_are_uniform_and_the_digits_say_them():
    """Hoeffding: of 2,000 images, a share is off by 0.065 with probability 1e-7."""
    vertices, polygons, numbers = [], [], []
    for seed in range(4):
        scene = TASK.sample_scenes(500, seeded(seed))
        first, there = scene.vertices[:, 0], scene.vertices > 0
        assert ((scene.vertices == first[:, None]) | ~there).all()
        vertices.append(first), polygons.append(scene.polygons), numbers.append(scene.numbers)
    vertices, polygons, numbers = map(torch.cat, (vertices, polygons, numbers))
    assert torch.equal(numbers, torch.stack([polygons, vertices], dim=1))
    for values, low, high in ((polygons, 1, 9), (vertices, 3, 7)):
        shares = values.bincount(minlength=high + 1)[low:].double() / len(values)
        assert len(shares) == high - low + 1
        assert (shares - 1 / len(shares)).abs().max() < 0.065
    together = (vertices - 3) * 9 + polygons - 1
    assert (together.bincount(minlength=45).double() / 2000 - 1 / 45).abs().max() < 0.065


def test_plain_backgrounds_are_one_colour_each_and_read_as_well():
    task = CountingPolygons("plain")
    images = task.sample(64, seeded(0))
    corners = images[:, :, [0, 0, -1], [0, -1, 0]]
    assert torch.equal(corners, corners[..., :1].expand_as(corners))
    assert len(corners[..., 0].unique(dim=0)) == 64
    assert JUDGE(images).good.sum() >= 63
    assert (task.name, TASK.name) == ("counting-polygons-plain", "counting-polygons")


def test_small_ones_lie_in_cells_and_are_read_without_error():
    task = CountingPolygonsSmall()
    images, scene = task.sample_with_scenes(400, seeded(1))
    assert images.shape[1:] == task.grid.sample_shape == (3, 96, 96)
    assert task.grid.num_patches == 64
    assert scene.polygons.unique().tolist() == [1, 2, 3, 4]
    assert scene.vertices.unique().tolist() == [0, 3, 4, 5, 6, 7]
    assert torch.equal(JUDGE.count(images), true_counts(scene))
    assert (images == 0).all(1).float().mean() > 0.7  # grey
    cells = images.unflatten(2, (4, 24)).unflatten(4, (4, 24))
    border = torch.cat([cells[:, :, :, edge] for edge in (0, -1)], dim=-1)
    assert (border == 0).all()
    shown = (cells != 0).any((3, 5)).any(1).sum((1, 2))
    assert torch.equal(shown, 2 + scene.polygons)


@pytest.mark.parametrize("task", [TASK, CountingPolygonsSmall()])
def test_symbols_say_what_patches_show(task):
    """Where a patch is mostly of the objects' colour its symbol is an object's; where it has none, it is background."""
    images, symbols = task.sample_with_symbols(30, seeded(16))
    again, scene = task.sample_with_scenes(30, seeded(16))
    assert torch.equal(images, again)
    assert (symbols.dtype, symbols.shape) == (torch.int64, (30, task.grid.num_patches))
    covered = coverage(scene)[:, : task.side, : task.side]
    covered = covered.unflatten(1, (-1, task.patch)).unflatten(3, (-1, task.patch)).mean((2, 4)).flatten(1)
    assert (symbols[covered > 0.6] != OTHER).all()
    assert (symbols[covered == 0] == OTHER).float().mean() > 0.95
    shown = true_counts(scene)[:, :OTHER] > 0
    for row, classes in zip(symbols, shown, strict=True):
        assert classes[row[row != OTHER]].all()


def test_every_polygon_has_the_objects_colour_in_its_middle():
    images, scene = TASK.sample_with_scenes(40, seeded(5))
    for image, vertices, centres in zip((images + 1) / 2, scene.vertices, scene.centres[:, 2:], strict=True):
        x, y = centres[vertices > 0].long().unbind(1)
        colours = image[:, y, x]
        assert torch.equal(colours, colours[:, :1].expand_as(colours))
        assert colours.amin(0) == pytest.approx(0, abs=1e-6)
        assert colours.amax(0) == pytest.approx(int(255 * VALUE) / 255, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ the judge


def test_images_are_judged_consistent_and_their_numbers_read():
    images, scene = TASK.sample_with_scenes(200, seeded(6))
    report = JUDGE(images)
    exact = (JUDGE.count(images) == true_counts(scene)).all(1)
    assert share_of(int(exact.sum()), 200).low > 0.95
    assert torch.equal(report.good[exact], torch.ones_like(report.good[exact]))
    assert torch.equal(report.polygons[exact], scene.polygons[exact])
    assert torch.equal(report.vertices[exact], scene.vertices[exact, 0])
    assert torch.equal(report.numbers[exact], scene.numbers.sort(1).values[exact])
    assert {values.dtype for values in report.measures().values()} == {torch.int64}
    assert torch.equal(report.measures()["wrong_numbers"] == 0, report.numbers_match)
    assert torch.equal(report.measures()["mixed_vertices"] == 0, report.uniform)


@pytest.mark.parametrize(
    ("task", "noise", "least"), [(TASK, 0.0, 0.98), (TASK, 0.1, 0.9), (CountingPolygonsSmall(), 0.1, 0.98)]
)
def test_verdicts_on_images_of_which_half_are_spoiled(task, noise, least):
    """The lower end of the 95 % interval, over images that neither training nor its own measurement has seen."""
    found = measure(None, 256, seeded(7), noise, task)
    assert share_of(round(256 * found["verdicts"]), 256).low > least
    assert found["verdicts"] + found["false_good"] + found["false_bad"] == pytest.approx(1)


def test_the_note_says_the_stored_accuracy():
    stored = held_out_accuracy()
    assert stored["images"] == 1024
    assert share_of(round(stored["images"] * stored["verdicts"]), stored["images"]).low > 0.99
    right, images = re.search(r"right on ([\d,]+) of ([\d,]+) held-out images", JUDGE.note).groups()
    assert int(images.replace(",", "")) == stored["images"]
    assert int(right.replace(",", "")) == round(stored["images"] * stored["verdicts"])
    assert "your own" in PolygonsJudge(ObjectReader()).note


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_digit_is_judged_wrong(which):
    scene = TASK.sample_scenes(64, seeded(8))
    numbers = scene.numbers.clone()
    numbers[:, which] = numbers[:, which] % 9 + 1
    changed = scene._replace(numbers=numbers)
    images = TASK.draw(changed, seeded(9))
    report, exact = JUDGE(images), (JUDGE.count(images) == true_counts(changed)).all(1)
    swapped = (numbers.flip(1) == scene.numbers).all(1)  # 4 triangles that say 4 and 3 in the other order
    assert not report.numbers_match[exact & ~swapped].any()
    assert report.uniform[exact].all()
    assert report.mismatch[exact & ~swapped].min() >= 1
    assert exact.float().mean() > 0.95


def test_one_polygon_of_other_vertices_is_seen():
    scene = TASK.sample_scenes(64, seeded(10))
    scene = scene._replace(vertices=scene.vertices.clone())
    scene.vertices[:, 0] = (scene.vertices[:, 0] - 2) % 5 + 3
    images = TASK.draw(scene, seeded(11))
    report, exact = JUDGE(images), (JUDGE.count(images) == true_counts(scene)).all(1)
    several = exact & (scene.polygons > 1)
    assert not report.uniform[several].any()
    assert (report.odd_polygons[several] == 1).all()
    assert report.uniform[exact & (scene.polygons == 1)].all()


def test_spoiled_scenes_are_half_of_them():
    """Spoiled in three of six ways; some of the changes say the same in the other order, or leave one polygon."""
    scene = TASK.sample_scenes(600, seeded(12))
    changed, good = spoiled(scene, seeded(13))
    same = (changed.numbers == scene.numbers).all(1) & (changed.vertices == scene.vertices).all(1)
    assert good[same].all()
    assert 0.4 < good.float().mean() < 0.65


@pytest.mark.parametrize("images", [torch.zeros(3, 3, 128, 128), torch.randn(3, 3, 128, 128, generator=seeded(0))])
def test_greys_and_noise_are_not_good(images):
    report = JUDGE(images)
    assert not report.good.any()
    assert (report.mismatch == 9).all()


def test_blank_images_of_any_colour_hold_no_polygon():
    levels = torch.tensor([-1.0, 0.0, 0.8, 1.0])
    images = torch.cartesian_prod(levels, levels, levels)[:, :, None, None].expand(-1, -1, 128, 128)
    report = JUDGE(images)
    assert not report.polygons.any()
    assert not report.vertices.any()
    assert not report.uniform.any()
    assert (report.measures()["mixed_vertices"] == 1).all()


def test_what_is_larger_than_the_largest_polygon_is_a_stray():
    rows = torch.arange(128)
    images = torch.zeros(2, 3, 128, 128)
    for image, side in zip(images, (36, 60), strict=True):  # the largest square has half a diagonal of 25.6: 36 a side
        inside = (rows >= 20) & (rows < 20 + side)
        image[:, inside[:, None] & inside] = torch.tensor([[0.8], [-1.0], [-1.0]])
    report = JUDGE(images)
    assert report.polygons.tolist() == [1, 0]
    assert report.vertices.tolist() == [4, 0]
    assert report.strays.tolist() == [0, 1]
    assert report.uniform.tolist() == [True, False]


def test_no_images_have_an_empty_report():
    report = JUDGE(torch.zeros(0, 3, 128, 128))
    assert [len(field) for field in report] == [0] * len(report)


def test_a_report_does_not_depend_on_the_batch():
    images = TASK.sample(5, seeded(14))
    together, counts = JUDGE(images), JUDGE.count(images)
    for i, image in enumerate(images):
        assert torch.equal(JUDGE.count(image[None])[0], counts[i])
        assert JUDGE(image[None]).good[0] == together.good[i]


def counted(polygons=(), digits=(), others=0):
    counts = torch.zeros(1, OTHER + 1, dtype=torch.int64)
    for vertices in polygons:
        counts[0, vertices - 3] += 1
    for digit in digits:
        counts[0, POLYGONS + digit - 1] += 1
    counts[0, OTHER] = others
    return counts


@pytest.mark.parametrize(
    ("polygons", "digits", "others", "match", "uniform", "mismatch", "odd"),
    [
        ([5, 5], (2, 5), 0, True, True, 0, 0),
        ([5, 5], (5, 2), 3, True, True, 0, 0),
        ([4, 4, 4, 4], (4, 4), 0, True, True, 0, 0),
        ([4, 4, 4, 4], (4,), 0, False, True, 9, 0),
        ([4, 4, 4], (4, 3, 3), 0, False, True, 9, 0),
        ([3], (3, 2), 0, False, True, 1, 0),
        ([3, 3, 7], (3, 3), 0, True, False, 0, 1),
        ([6, 7], (2, 6), 0, True, False, 0, 1),  # of equals the fewer vertices
        ([6, 7], (2, 7), 0, False, False, 1, 1),
        ([], (1, 3), 0, False, False, 4, 0),
        ([], (), 5, False, False, 9, 0),
        ([3] * 12, (3, 9), 0, False, True, 3, 0),
    ],
)
def test_reports_of_counts(polygons, digits, others, match, uniform, mismatch, odd):
    report = _report(counted(polygons, digits, others))
    assert (report.numbers_match.item(), report.uniform.item()) == (match, uniform)
    assert (report.mismatch.item(), report.odd_polygons.item(), report.strays.item()) == (mismatch, odd, others)
    assert report.polygons.item() == len(polygons)
    assert report.good.item() == (match and uniform)


def test_objects_of_every_image_are_found():
    """Every object is one connected area; 150 images have a thousand objects."""
    images, scene = TASK.sample_with_scenes(150, seeded(15))
    found = find_objects(images).there.sum(1)
    assert (found == scene.polygons + 2).float().mean() > 0.98
