"""Networks for the pixels of a patch, where single pixels matter: one in a token's input, one in its read-out.

A linear layer tells a token the sums of its pixels, and has its prediction know them only through the token's `width`
numbers. With `PixelEncoder` a token also sees the distribution of its pixels' colours, which tells two colours apart:

    tokens += W mean over pixels of tanh(E z + e)      z (C, pixels): the noisy patch; E (2 H, C), W (width, 2 H)

In `PixelHead` every token writes a small network, which is applied to each pixel of its patch:

    hidden = tanh(U (z + s) + b)       U (H, C), s (C) and b (H) from the token
    x, mix = V hidden + c              each (C, pixels); V (2 C, H) and c (2 C) from the token
    velocity = (z - x) / max(t, FLOOR)

x is the predicted clean patch, trained through the velocity as in Li & He 2025, "Back to Basics: Let Denoising
Generative Models Denoise". Why tanh: a pixel that is m + d or m - d has the posterior mean
m + d tanh((1 - t) d . (z - (1 - t) m) / t^2 + prior), which is one hidden unit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipr_fast.kernels import pixel_head
from ipr_fast.kernels.pixel_features import pixel_features
from ipr_fast.models.packed import PackedWeights, linear
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.trace import span

FLOOR = 0.05  # of the level that the velocity is divided by: it would amplify errors at levels that no step has


class PixelEncoder(nn.Module):
    """What a token gets of the distribution of its pixels, from `hidden` features of each."""

    def __init__(self, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, channels))
        self.bias = nn.Parameter(torch.randn(hidden))
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, patches: Tensor, packed: PackedWeights | None = None) -> Tensor:
        """Return what is added to the tokens (B, n, width) of noisy patches (B, n, P)."""
        with span("pixel_features"):
            features = pixel_features(patches, self.weight, self.bias)
        return linear(self.out, features, packed)


class PixelHead(nn.Module):
    """Predicts patches from their tokens' features and noisy pixels, with H = `hidden` units for each pixel.

    weights: writes U, b, s, V, c and the patch's log-variance, in this order, from features of `width` numbers.
    """

    def __init__(self, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.weights = nn.Linear(width, sum(pixel_head.sizes(channels, hidden)) + 1)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():  # U and b: with V = 0 as well, neither would have a gradient
            self.weights.bias[: hidden * (channels + 1)].normal_()

    def forward(
        self, features: Tensor, patches: Tensor, levels: Tensor, packed: PackedWeights | None = None
    ) -> Prediction:
        """Return the prediction of noisy patches (B, n, P) at levels (B, n), from features (B, n, width)."""
        weights = linear(self.weights, features, packed)
        with span("pixel_head"):
            velocity, mix = pixel_head.pixel_head(
                weights, patches, levels, channels=self.channels, hidden=self.hidden, floor=FLOOR
            )
        return Prediction(velocity, mix, weights[..., -1])
