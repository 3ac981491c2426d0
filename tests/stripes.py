"""Tasks that a tiny model learns at once, and short settings."""

from dataclasses import replace

import torch

from ipr_fast import Vocabulary
from ipr_fast.models import PatchTransformerConfig, TokenTransformerConfig
from ipr_fast.training.trainer import TrainSettings


class Stripes:
    """A task that a tiny model learns at once: every sample is all -1 or all +1."""

    name = "stripes"
    config = PatchTransformerConfig(channels=1, image_size=8, patch_size=4, width=16, depth=1, num_heads=1)

    def initialise(self, model):
        pass

    def sample(self, batch_size, generator):
        return (torch.randint(0, 2, (batch_size, 1, 1, 1), generator=generator) * 2.0 - 1).expand(-1, 1, 8, 8)


class SymbolStripes(Stripes):
    """The same task, which knows the sign of every patch."""

    num_symbols = 2

    def sample_with_symbols(self, batch_size, generator):
        samples = self.sample(batch_size, generator)
        return samples, (samples[:, 0, 0, :1] > 0).long().expand(-1, 4)


class TokenStripes:
    """A task of tokens that a tiny model learns at once: all of a sample's tokens are 1, or all 2."""

    name, vocabulary, length = "token-stripes", Vocabulary(3, 0), 6
    config = TokenTransformerConfig(vocabulary_size=3, mask_id=0, columns=6, width=16, depth=1, num_heads=1)

    def initialise(self, model):
        pass

    def sample(self, batch_size, generator):
        return torch.randint(1, 3, (batch_size, 1), generator=generator).expand(-1, 6)


class PixelStripes(Stripes):
    """The same task, for a model with a pixel head."""

    config = replace(Stripes.config, pixel_width=3)


QUICK = TrainSettings(steps=40, batch_size=16, warmup=5, save_every=10, seed=3)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def with_samples(sample):
    """The task Stripes with another `sample`, a function of the batch size."""
    task = Stripes()
    task.sample = lambda batch_size, generator: sample(batch_size)
    return task
