"""Half-precision networks get patches of their own type; levels and the state stay float32."""

import pytest
import torch
from torch import nn

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, check_model, generate_batch, random_patches
from ipr_fast.models import Guided, Parameterised, PatchTransformer, SRMUNet
from ipr_fast.sampling.prediction import patch_dtype


class Linear(nn.Module):
    """A user's network that casts nothing, and notes what it gets."""

    grid = PatchGrid(1, 16, 16, 4)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = nn.Linear(16, 16), set()

    def forward(self, patches, levels, active=None):
        self.seen.add((patches.dtype, levels.dtype))
        slots = patches if active is None else active.gather(patches)
        return Prediction(self.layer(slots))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_network_works_in_half_precision(dtype, backend):
    model, options = Linear().to(dtype).eval(), {"schedule": Schedule(2, 0.5), "seed": 1, "backend": backend}
    x = generate_batch(4, model=model, **options)
    x = ipr_fast.refine_batch(x, random_patches(0.5), 2, model=model, **options)
    assert x.dtype == torch.float32
    assert model.seen == {(dtype, torch.float32)}
    exact = Linear().to(dtype).float().eval()
    expected = generate_batch(4, model=exact, **options)
    expected = ipr_fast.refine_batch(expected, random_patches(0.5), 2, model=exact, **options)
    assert not torch.equal(x, x.to(dtype).float())  # the state is not rounded
    assert (x - expected).abs().max() < 32 * torch.finfo(dtype).eps * expected.abs().max()  # products of a dozen steps


def test_check_model_gives_them_too():
    model = Linear().bfloat16().eval()
    check_model(model)
    assert model.seen == {(torch.bfloat16, torch.float32)}


def test_what_says_its_type_gets_it():
    class Mixed(Linear):
        patch_dtype = torch.float64

    assert patch_dtype(Mixed()) == torch.float64
    for model in (PatchTransformer, SRMUNet, Parameterised):
        assert model.patch_dtype == torch.float32
    two = Linear().bfloat16()
    two.other = nn.Linear(1, 1)
    assert patch_dtype(two) == patch_dtype(Linear()) == patch_dtype(lambda patches: patches) == torch.float32


def test_wrappers_pass_patches_on_in_the_type_of_their_network():
    class Conditioned(Linear):
        def forward(self, patches, levels, active=None, *, condition):
            return super().forward(patches, levels, active)

    model = Conditioned().bfloat16().eval()
    options = {"schedule": Schedule(2, 1.0), "condition": torch.zeros(3)}
    generate_batch(3, model=Guided(model, 2.0, torch.tensor(0.0)), **options)
    generate_batch(3, model=Parameterised(model), **options)
    assert model.seen == {(torch.bfloat16, torch.float32)}


def test_a_type_that_is_none_is_refused():
    model = Linear()
    model.patch_dtype = "float16"
    with pytest.raises(ValueError, match=r"^model: patch_dtype must be a torch\.dtype, got 'float16'"):
        generate_batch(1, model=model)
