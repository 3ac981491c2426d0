"""The networks for pixels: their formulas, and what they are exact for."""

import pytest
import torch
from small_models import PIXELS, randomise

from ipr_fast.models import PatchTransformer
from ipr_fast.models.packed import PackedWeights
from ipr_fast.models.pixel_networks import FLOOR, PixelEncoder, PixelHead

ROUNDING = 2.0**-24  # of one float32 operation


def test_the_encoders_formula(generator):
    encoder = randomise(PixelEncoder(3, 10, 4), seed=0)
    patches, packed = torch.randn(40, 4, 48, generator=generator), PackedWeights()
    packed.pack(encoder)
    first, bias, second = encoder.weight.double(), encoder.bias.double(), encoder.out.weight.double()
    for b, n in ((0, 0), (17, 2), (39, 3)):
        pixels = patches[b, n].double().view(3, 16).T
        features = sum(torch.tanh(first @ pixel + bias) for pixel in pixels) / 16
        for found in (encoder(patches), encoder(patches, packed)):
            torch.testing.assert_close(found[b, n].double(), second @ features, atol=40 * ROUNDING, rtol=0)


def test_the_encoder_does_not_see_where_a_pixel_is(generator):
    encoder = PixelEncoder(3, 10, 4)
    patches = torch.randn(5, 48, generator=generator)
    moved = patches.view(5, 3, 16)[..., torch.randperm(16, generator=generator)].flatten(1)
    torch.testing.assert_close(encoder(moved), encoder(patches), atol=1e-6, rtol=0)


@pytest.fixture
def head() -> PixelHead:
    return randomise(PixelHead(3, 10, 5), seed=0)


def make_case(generator, count=7):
    features, patches = torch.randn(2, count, 10, generator=generator), torch.randn(2, count, 48, generator=generator)
    return features, patches, torch.rand(2, count, generator=generator)


def by_hand(head, features, patches, level):
    """One patch in float64, pixel by pixel."""
    written = head.weights.weight.double() @ features.double() + head.weights.bias.double()
    first, first_bias, shift, second, second_bias, log_variance = written.split([15, 5, 3, 30, 6, 1])
    velocity, mix = torch.empty(3, 16, dtype=torch.float64), torch.empty(3, 16, dtype=torch.float64)
    for i, pixel in enumerate(patches.double().view(3, 16).T):
        hidden = torch.tanh(first.view(5, 3) @ (pixel + shift) + first_bias)
        out = second.view(6, 5) @ hidden + second_bias
        velocity[:, i], mix[:, i] = (pixel - out[:3]) / max(level, FLOOR), torch.sigmoid(out[3:])
    return velocity.flatten(), mix.flatten(), log_variance[0]


def test_the_formula(head, generator):
    features, patches, levels = make_case(generator)
    levels[0, 0], levels[0, 1], levels[0, 2] = 0.0, 1.0, FLOOR / 2
    packed = PackedWeights()
    packed.pack(head)
    for prediction in (head(features, patches, levels), head(features, patches, levels, packed)):
        for b, n in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 6)):
            expected = by_hand(head, features[b, n], patches[b, n], levels[b, n].item())
            # Sums of 11, 4 and 6 terms below 4, then a division by the level.
            allowed = 100 * ROUNDING / max(levels[b, n].item(), FLOOR)
            for field, value in zip(prediction, expected, strict=True):
                torch.testing.assert_close(field[b, n].double(), value, atol=allowed, rtol=0)


def test_one_unit_is_the_posterior_mean_of_two_colours(generator):
    """A pixel is m + d with probability q, else m - d; the head gets the parameters that its docstring tells."""
    t, q = 0.4, 0.3
    m, d = torch.tensor([-0.3, -0.2, 0.1]), torch.tensor([0.7, -0.7, 0.2])
    colours = torch.stack([m + d, m - d])
    z = (1 - t) * colours[torch.randint(2, (16,), generator=generator)] + t * torch.randn(16, 3, generator=generator)
    log_odds = torch.log(torch.tensor([q, 1 - q])) - (z[:, None] - (1 - t) * colours).square().sum(-1) / (2 * t**2)
    mean = log_odds.softmax(1) @ colours
    head = PixelHead(3, 1, 1)
    prior = torch.tensor([q / (1 - q)]).log() / 2
    mix = torch.zeros(3)
    written = torch.cat([(1 - t) * d / t**2, prior, (t - 1) * m, d, mix, m, mix, torch.zeros(1)])
    with torch.no_grad():
        head.weights.bias.copy_(written)
        found = head(torch.zeros(1, 1, 1), z.T.reshape(1, 1, 48), torch.full((1, 1), t))
    expected = ((z - mean) / t).T.flatten()
    torch.testing.assert_close(found.velocity[0, 0], expected, atol=1e-5, rtol=0)


def test_a_new_head_predicts_zero_and_learns_in_every_weight(generator):
    torch.manual_seed(0)
    head = PixelHead(3, 10, 5)
    features, patches, levels = make_case(generator)
    clean = patches - levels.clamp(min=FLOOR)[..., None] * head(features, patches, levels).velocity
    assert clean.abs().max() < 4 * ROUNDING * patches.abs().max()
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-5)
    for _ in range(2):  # the first step moves V from 0, the second moves U and b
        optimizer.zero_grad()
        sum((field - 1).square().sum() for field in head(features, patches, levels)).backward()
        optimizer.step()
    assert (head.weights.weight.grad != 0).all()


def test_no_patches(head):
    prediction = head(torch.zeros(0, 4, 10), torch.zeros(0, 4, 48), torch.zeros(0, 4))
    assert [field.shape for field in prediction] == [(0, 4, 48), (0, 4, 48), (0, 4)]


def test_the_inputs_are_left_alone(head, generator):
    case = make_case(generator)
    kept = [each.clone() for each in case]
    with torch.no_grad():
        head(*case)
    assert all(torch.equal(*pair) for pair in zip(case, kept, strict=True))


def test_velocities_are_float32_whatever_the_weights_are(generator):
    """The division by a small level is of the noisy patches as they came."""
    model = randomise(PatchTransformer(PIXELS), seed=0).half()
    patches, levels = torch.randn(1, 16, 48, generator=generator), torch.rand(1, 16, generator=generator)
    assert model(patches, levels).velocity.dtype == torch.float32
