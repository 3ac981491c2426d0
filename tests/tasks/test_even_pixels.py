import colorsys
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ipr_fast.tasks.even_pixels import EvenPixels, HueJudge, colours

PIXELS, BINS = 1024, 256
OPPOSITE_SUM = -0.6  # of a colour and its opposite, in each channel
FAILS = 1e-6  # probability that a statistical test fails by chance


def slow_check(image):
    """Compute (imbalance, saturation_std, value_std) of an image (3, 32, 32) as the benchmark does, in loops."""
    one, six = np.float32(1), np.float32(6)
    histogram, saturations, values = [0] * BINS, [], []
    for y in range(32):
        for x in range(32):
            red, green, blue = (np.float32(min(max((c + one) / np.float32(2), 0), 1)) for c in image[:, y, x])
            most, least = max(red, green, blue), min(red, green, blue)
            hue = saturation = np.float32(0)
            if most > least:
                saturation = (most - least) / most
                if most == red:
                    hue = (green - blue) / (most - least)
                elif most == green:
                    hue = np.float32(2) + (blue - red) / (most - least)
                else:
                    hue = np.float32(4) + (red - green) / (most - least)
                hue = hue / six % one
            histogram[min(int(hue * np.float32(BINS)), BINS - 1)] += 1
            saturations.append(float(saturation))
            values.append(float(most))
    peak = histogram.index(max(histogram))
    opposite = (peak + 128) % 256
    borders = []
    for doubled in (min(peak, opposite) + max(peak, opposite), min(peak, opposite) + max(peak, opposite) + 256):
        border = doubled // 2
        borders.append(border - 256 if border > 256 else border)
    low, high = sorted(borders)
    return abs(sum(histogram[low:high]) - 512), deviation(saturations), deviation(values)


def deviation(numbers):
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def paint(pixels):
    """Paint an image (1, 3, 32, 32) with these numbers of pixels, {bin of hue: count}, in the middles of the bins."""
    colour = [
        colorsys.hsv_to_rgb((place + 0.5) / BINS, 1.0, 0.7) for place, count in pixels.items() for _ in range(count)
    ]
    return 2 * torch.tensor(colour).T.reshape(1, 3, 32, 32) - 1


def flip(image, count):
    """Give `count` pixels of an even image (3, 32, 32) the other hue."""
    flat = image.flatten(1).clone()
    is_first = (flat == flat[:, :1]).all(0)
    flat[:, is_first.nonzero()[:count, 0]] = flat[:, ~is_first][:, :1]
    return flat.view_as(image)


def pictures(kind, generator):
    """Draw random, perfect or broken images; the last have flipped pixels, noise and only 256 shades per channel."""
    if kind == "random":
        return 2.4 * torch.rand(6, 3, 32, 32, generator=generator) - 1.2
    even = EvenPixels().sample(6, generator)
    if kind == "perfect":
        return even
    images = torch.stack([flip(image, 17 * i) for i, image in enumerate(even)])
    images += torch.tensor([0.0, 0.0, 0.02, 0.1, 0.1, 0.5]).view(6, 1, 1, 1) * torch.randn(
        images.shape, generator=generator
    )
    return (images.clamp(-1, 1) * 127.5).round() / 127.5


KINDS = ["random", "perfect", "broken"]


# ---------------------------------------------------------------------------------------------------------- the samples


def test_samples_are_512_pixels_of_each_of_two_opposite_colours(generator):
    images = EvenPixels().sample(40, generator)
    assert images.shape == (40, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    for image in images:
        colour, count = image.flatten(1).unique(dim=1, return_counts=True)
        assert count.tolist() == [512, 512]
        assert torch.allclose(colour.sum(1), torch.full((3,), OPPOSITE_SUM), atol=1e-6)
        hsv = [colorsys.rgb_to_hsv(*((c + 1) / 2).tolist()) for c in colour.T.double()]
        assert abs(hsv[0][0] - hsv[1][0]) == pytest.approx(0.5, abs=1e-6)
        for _, saturation, value in hsv:
            assert saturation == pytest.approx(1, abs=1e-6)
            assert value == pytest.approx(0.7, abs=1e-6)
    assert torch.allclose(images.mean((2, 3)), torch.full((40, 3), OPPOSITE_SUM / 2), atol=1e-6)


def test_samples_fit_the_tasks_grid(generator):
    assert EvenPixels().sample(2, generator).shape[1:] == EvenPixels().grid.sample_shape


def test_samples_follow_the_generator():
    draw = [EvenPixels().sample(3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert EvenPixels().sample(0, torch.Generator()).shape == (0, 3, 32, 32)


def test_hues_and_places_are_uniform(generator):
    """Bounds: Dvoretzky, Kiefer and Wolfowitz (Massart 1990) for the hue, Hoeffding for the places.

    A share x of the range without any of n hues has probability (1 - x)**n < exp(-n x).
    """
    count = 1500
    images = EvenPixels().sample(count, generator)
    first = ((images[:, :, 0, 0] + 1) / 2).tolist()
    hue = torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] % 0.5 for rgb in first]).double().sort().values
    empirical = torch.arange(count + 1) / count
    distance = torch.maximum((2 * hue - empirical[:-1]).abs(), (empirical[1:] - 2 * hue).abs()).max()
    assert distance < math.sqrt(math.log(2 / FAILS) / (2 * count))
    assert 2 * hue[0] < math.log(1 / FAILS) / count
    assert 2 * hue[-1] > 1 - math.log(1 / FAILS) / count
    is_lower = images[:, 1] > images[:, 2]  # more green than blue: the hue is below 0.5
    assert (is_lower.sum((1, 2)) == 512).all()
    share = is_lower.double().mean(0)
    assert (share - 0.5).abs().max() < math.sqrt(math.log(2 * PIXELS / FAILS) / (2 * count))


def test_colours_are_those_of_the_hues():
    hue = torch.arange(600) / 600
    wanted = torch.tensor([colorsys.hsv_to_rgb(h, 1.0, 0.7) for h in hue.tolist()]).T
    assert torch.allclose(colours(hue[None]), 2 * wanted[None] - 1, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the judge


def test_even_images_are_balanced(generator):
    report = EvenPixels().judge()(EvenPixels().sample(300, generator))
    assert report.balanced.all()
    assert report.good is report.balanced
    assert (report.imbalance == 0).all()
    assert report.saturation_std.max() < 1e-6
    assert report.value_std.max() < 1e-6
    assert {name: values.shape for name, values in report.measures().items()} == {
        "imbalance": (300,),
        "saturation_std": (300,),
        "value_std": (300,),
    }
    assert report.measures()["imbalance"] is report.imbalance


def test_two_of_a_hundred_images_of_noise_are_balanced_by_their_hues(generator):
    """As the judge says of itself. 4,000 images: four standard deviations are 0.9 %."""
    judge = EvenPixels().judge()
    share = judge(torch.randn(4000, 3, 32, 32, generator=generator)).balanced.float().mean()
    assert share.item() == pytest.approx(0.02, abs=0.009)
    assert "two of a hundred images of noise are" in judge.note


@pytest.mark.parametrize("count", [0, 1, 2, 100, 511, 512])
def test_flipped_pixels_are_counted_exactly(count, generator):
    images = torch.stack([flip(image, count) for image in EvenPixels().sample(30, generator)])
    report = HueJudge()(images)
    assert (report.imbalance == count).all()
    assert (report.balanced == (count == 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_reports_equal_a_count_pixel_by_pixel(kind, generator):
    images = pictures(kind, generator)
    report = HueJudge()(images)
    for i, image in enumerate(images.numpy()):
        imbalance, saturation_std, value_std = slow_check(image)
        assert report.imbalance[i] == imbalance
        assert report.balanced[i] == (imbalance == 0)
        assert report.saturation_std[i].item() == pytest.approx(saturation_std, rel=1e-6)
        assert report.value_std[i].item() == pytest.approx(value_std, rel=1e-6)


@pytest.mark.parametrize("place", [0, 1, 63, 64, 65, 126, 127])
@pytest.mark.parametrize("more", [0, 88])
def test_every_place_of_the_peaks_is_judged_alike(place, more):
    for pixels in ({place: 512 + more, place + 128: 512 - more}, {place: 512 - more, place + 128: 512 + more}):
        image = paint(pixels)
        assert HueJudge()(image).imbalance.item() == more
        assert slow_check(image[0].numpy())[0] == more


def test_pixels_belong_to_the_peak_within_a_quarter_turn():
    """Around a peak in bin 10 the borders are bins 74 (beyond it) and 202 (within it)."""
    image = paint({10: 500, 73: 6, 74: 100, 138: 200, 201: 200, 202: 18})
    assert HueJudge()(image).imbalance.item() == 512 - 500 == slow_check(image[0].numpy())[0]


def test_of_equally_full_bins_the_first_is_the_peak():
    """A peak in bin 10 has the side of bins 74 to 201, which holds nothing here; one in bin 60 has 124 to 251."""
    for order in ((10, 60, 210), (60, 210, 10)):
        image = paint({place: {210: 224}.get(place, 400) for place in order})
        assert HueJudge()(image).imbalance.item() == slow_check(image[0].numpy())[0] == 512


def test_a_hue_that_rounds_to_one_lies_in_the_last_bin():
    """Red with a trace of blue: its hue of -7e-9 becomes 1.0. Peaks in bins 64 and 192 tell bin 255 from bin 0."""
    image = paint({64: 600, 192: 424})
    flat = image.view(3, PIXELS)
    flat[:, -12:] = torch.tensor([0.4, -1.0, -1 + 2**-24])[:, None]
    red, green, blue = ((flat[:, -1] + 1) / 2).numpy()
    assert (green - blue) / red / np.float32(6) % np.float32(1) == 1
    assert HueJudge()(image).imbalance.item() == slow_check(image[0].numpy())[0] == 600 - 512
    flat[2, -12:] = -1  # bin 0
    assert HueJudge()(image).imbalance.item() == slow_check(image[0].numpy())[0] == 612 - 512


def test_images_of_greys_have_no_hue_and_one_side():
    shades = torch.linspace(-1, 1, PIXELS).reshape(1, 1, 32, 32).expand(1, 3, 32, 32)
    for image in (shades, torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), -1.0)):
        report = HueJudge()(image)
        assert report.imbalance.tolist() == [512]
        assert report.balanced.tolist() == [False]
        assert report.saturation_std.tolist() == [0]
        assert report.value_std.item() == pytest.approx(slow_check(image[0].numpy())[2], rel=1e-6)
    assert report.value_std.tolist() == [0]


def test_values_beyond_the_range_are_clamped(generator):
    images = 3 * torch.randn(5, 3, 32, 32, generator=generator)
    for far, cut in zip(HueJudge()(images), HueJudge()(images.clamp(-1, 1)), strict=True):
        assert torch.equal(far, cut)


def test_a_report_does_not_depend_on_the_batch(generator):
    images = torch.cat([pictures(kind, generator) for kind in KINDS])
    together = HueJudge()(images)
    for i, image in enumerate(images):
        alone = HueJudge()(image[None])
        assert alone.imbalance[0] == together.imbalance[i]
        assert alone.saturation_std[0].item() == pytest.approx(together.saturation_std[i].item(), rel=1e-6)
        assert alone.value_std[0].item() == pytest.approx(together.value_std[i].item(), rel=1e-6)


def test_no_images_have_an_empty_report():
    report = HueJudge()(torch.zeros(0, 3, 32, 32))
    assert [tuple(field.shape) for field in report] == [(0,)] * 4
    assert report.balanced.dtype == torch.bool
    assert report.imbalance.dtype == torch.int64


# -------------------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture(scope="module")
def evaluation():
    """The evaluation module of srmbench alone: importing the package needs libraries that it does not install."""
    package = importlib.util.find_spec("srmbench")
    if package is None:
        pytest.skip("srmbench is not installed")
    pytest.importorskip("matplotlib")
    path = Path(package.submodule_search_locations[0]) / "evaluations" / "even_pixels_evaluation.py"
    spec = importlib.util.spec_from_file_location("even_pixels_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EvenPixelsEvaluation()


@pytest.mark.parametrize("kind", KINDS)
def test_reports_equal_those_of_the_benchmark(evaluation, kind, generator):
    """The benchmark sums 1,024 numbers up to 1 in float32: its deviations are accurate to some 1e-7."""
    images = torch.cat([pictures(kind, generator) for _ in range(4)])
    report = HueJudge()(images)
    for i in range(len(images)):
        theirs = evaluation.evaluate(images[i : i + 1])
        assert theirs["color_imbalance_count"].item() == report.imbalance[i].item()
        assert bool(theirs["is_color_count_even"].item()) == report.balanced[i].item()
        assert theirs["saturation_std"].item() == pytest.approx(report.saturation_std[i].item(), abs=1e-6)
        assert theirs["value_std"].item() == pytest.approx(report.value_std[i].item(), abs=1e-6)
