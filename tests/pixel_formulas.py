"""The operations on pixels in float64, and bounds of what float32 may be off."""

import torch

ROUNDING = 2.0**-24  # of one float32 operation
TANH = 8 * ROUNDING  # an exponential that is off by two units, a sum, a quotient, a difference


def features(z, weight, bias):
    """The features (B, n, K), and their bound."""
    z, weight, bias = z.double(), weight.double(), bias.double()
    channels = weight.shape[1]
    pixels = z.unflatten(-1, (channels, -1)).transpose(-1, -2)
    sums = (channels + 1) * ROUNDING * (pixels.abs() @ weight.abs().T + bias.abs())
    count = pixels.shape[-2]
    return (pixels @ weight.T + bias).tanh().mean(-2), (sums + TANH).mean(-2) + (count + 1) * ROUNDING


def head(weights, z, level, channels, hidden, floor):
    """Velocity and mix (B, n, P), and the bound of each."""
    weights, z, level = weights.double(), z.double(), level.double()
    parts = (hidden * channels, hidden, channels, 2 * channels * hidden, 2 * channels)
    first, bias, shift, second, last = weights[..., : sum(parts)].split(parts, dim=-1)
    first, second = first.unflatten(-1, (hidden, channels)), second.unflatten(-1, (2 * channels, hidden))
    pixels = z.unflatten(-1, (channels, -1))
    x = pixels + shift[..., None]
    largest = pixels.abs() + shift.abs()[..., None]
    units = torch.tanh(first @ x + bias[..., None])
    of_units = TANH + (channels + 2) * ROUNDING * (first.abs() @ largest + bias.abs()[..., None])
    out = second @ units + last[..., None]
    of_out = second.abs() @ of_units + (hidden + 1) * ROUNDING * (second.abs() @ units.abs() + last.abs()[..., None])
    (clean, mix), (of_clean, of_mix) = (each.unflatten(-2, (2, channels)).unbind(-3) for each in (out, of_out))
    divisor = level.clamp(min=floor)[..., None, None]
    velocity = (pixels - clean) / divisor
    of_velocity = (of_clean + ROUNDING * (pixels.abs() + clean.abs())) / divisor + 2 * ROUNDING * velocity.abs()
    return (velocity.flatten(-2), mix.sigmoid().flatten(-2)), (of_velocity.flatten(-2), of_mix.flatten(-2) + TANH)


def assert_within(found, expected, bound):
    """Within the bound, and one rounding to the type of what was found."""
    assert found.shape == expected.shape
    last = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    assert ((found.double() - expected).abs() <= bound + last * expected.abs()).all()
