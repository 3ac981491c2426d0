"""A user's task of sequences, and one of video, is trained, saved, judged and refined."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from stripes import QUICK

import ipr_fast
from ipr_fast.evaluation.evaluate import evaluate
from ipr_fast.models import PatchTransformerConfig
from ipr_fast.training.run import train

LAYERS = {"width": 16, "depth": 1, "num_heads": 1}


class Report(NamedTuple):
    distance: torch.Tensor

    @property
    def good(self):
        return self.distance < 1

    def measures(self):
        return {"distance": self.distance}


class Judge:
    note = ""

    def __call__(self, samples):
        return Report((samples.flatten(1).mean(1) - 5).abs())


class Level:
    """Latents about 5: each sample is one number from 4 to 6."""

    name, noun, adjective = "level", "sample", "level"

    def __init__(self, config):
        self.config = config

    def sample(self, batch_size, generator):
        number = 4 + 2 * torch.rand(batch_size, *[1] * len(self.config.sample_shape), generator=generator)
        return number.expand(-1, *self.config.sample_shape).contiguous()

    def judge(self):
        return Judge()


SEQUENCE = PatchTransformerConfig(2, (12,), 3, value_range=(4.0, 6.0), **LAYERS)
VIDEO = PatchTransformerConfig(1, (4, 4, 6), (2, 2, 3), value_range=None, **LAYERS)


@pytest.mark.parametrize("config", [SEQUENCE, VIDEO], ids=["sequence", "video"])
def test_a_task_of_another_grid_is_trained_and_refined(config, tmp_path):
    weights = train(Level(config), replace(QUICK, steps=6), tmp_path, progress=False)
    model = ipr_fast.load_model(weights)
    assert (model.config, model.value_range) == (config, config.value_range)
    results = evaluate(Level(config), model, count=4, iters=2)
    assert results is not None
    x = ipr_fast.generate_batch(3, model=model)
    assert x.shape == (3, *config.sample_shape)
    assert ipr_fast.refine_batch(x, ipr_fast.random_patches(), 2, model=model).isfinite().all()


@pytest.mark.parametrize(("value_range", "told"), [((-1.0, 1.0), r"in \[-1, 1\]"), ((4.0, 4.5), r"in \[4, 4.5\]")])
def test_samples_outside_the_configurations_range_are_refused(value_range, told, tmp_path):
    config = replace(SEQUENCE, value_range=value_range)
    with pytest.raises(ValueError, match=rf"^task level: sample\(\) must return finite values {told}, got values from"):
        train(Level(config), replace(QUICK, steps=1), tmp_path, progress=False)
