"""The baselines give what refine_batch gives, and what is not close is seen not to be."""

import pytest
import torch
from baselines import loops
from small_models import TINY, randomise
from support import gate, subjects

from ipr_fast import Schedule, random_patches, refine_batch
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["transformer", "unet"])
def denoiser(request):
    if request.param == "transformer":
        return randomise(PatchTransformer(TINY), seed=0)
    torch.manual_seed(0)
    config = SRMUNetConfig(2, 16, 4, (32, 32), (False, True), 1, 32, 32, 16)
    return SRMUNet(config).eval().requires_grad_(False)


@pytest.mark.parametrize("schedule", [Schedule(10, 0.8), Schedule(3, 0.0), Schedule(4, 1.0)], ids=str)
@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_the_loops_equal_refine_batch(denoiser, generator, schedule, seed):
    """With the library's random numbers; an overlap of 1 starts all patches in one step."""
    x = torch.randn(4, *denoiser.grid.sample_shape, generator=generator).clamp(-1, 1)
    options = {"stochasticity": 0.7, "temperature": 0.9}
    ids = torch.tensor([7, 2, 0, 11])
    ours = {"model": denoiser, "schedule": schedule, "seed": seed, "chain_ids": ids, "backend": "torch"}
    expected = refine_batch(x, random_patches(0.3), 3, **ours, **options)
    network, noise = loops.baseline_network(denoiser), loops.LibraryNoise(seed, ids)
    sampling = loops.Sampling(schedule, 0.3, **options)
    torch.testing.assert_close(loops.batched(network, x, 3, sampling, noise), expected, atol=1e-4, rtol=0)
    found = loops.one_at_a_time(network, x, 3, sampling, noise, CPU)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - x).abs().max() > 0.1


def test_the_plain_transformer_is_the_transformer(model, generator):
    patches = torch.randn(5, 16, 16, generator=generator)
    is_active = torch.rand(5, 16, generator=generator) < 0.4
    levels = torch.rand(5, 16, generator=generator) * is_active
    call = patches, levels, is_active
    for found, expected in zip(loops.baseline_network(model)(*call), model.predict(*call), strict=True):
        torch.testing.assert_close(found[is_active], expected[is_active], atol=1e-5, rtol=1e-5)


def test_torch_noise_renoises_as_many_patches_and_no_others(model, generator):
    x = torch.randn(6, 1, 16, 16, generator=generator)
    noise = loops.TorchNoise(CPU)
    assert noise.choose(1, 6, 16, 5).sum(1).tolist() == [5] * 6
    network = loops.baseline_network(model)
    refined = loops.batched(network, x, 1, loops.Sampling(Schedule(2, 0.5)), noise)
    changed = (model.grid.to_patches(refined) != model.grid.to_patches(x)).any(2)
    assert changed.sum(1).tolist() == [4] * 6
    assert loops.one_at_a_time(network, x[:0], 1, loops.Sampling(Schedule(2)), noise, CPU).shape == (0, 1, 16, 16)


def test_the_schedule_is_shortened_no_more_than_needed():
    assert subjects.shortened(Schedule(30, 0.9), 16, 10) == Schedule(4, 0.9)
    assert subjects.shortened(Schedule(10, 0.8), 4, 16) == Schedule(10, 0.8)
    assert subjects.shortened(Schedule(3, 0.0), 20, 20) == Schedule(1, 0.0)
    assert subjects.shortened(Schedule(3, 0.0), 20, 10) == Schedule(10, 1.0)
    assert Schedule(10, 1.0).steps(20) == 10


def test_no_case_comes_twice_and_all_of_them_are_of_known_models_and_loops():
    for sizes in ("smoke", "small", "full"):
        cases = subjects.cases(sizes)
        assert len({str(case) for case in cases}) == len(cases)
        assert {case.subject for case in cases} <= set(subjects.makers(sizes == "smoke"))
        assert all(set(case.targets) <= set(case.against) for case in cases)
        assert {name for case in cases for name in case.against} <= {"one at a time", "batched", "compiled"}


# ------------------------------------------------------------------------------------------------------------- gate


def test_the_loops_and_the_engine_are_close_to_the_reference(denoiser):
    sampling = loops.Sampling(Schedule(4, 0.5))
    check = gate.loops_and_engine(denoiser, loops.baseline_network(denoiser), sampling, CPU)
    check.hold()
    assert check.difference < 1e-4


class Wrong:
    """A network whose velocities are two per cent too large."""

    def __init__(self, network):
        self.network, self.grid = network, network.grid

    def __call__(self, *call):
        prediction = self.network(*call)
        return prediction._replace(velocity=1.02 * prediction.velocity)


def test_a_loop_with_another_network_is_not(denoiser):
    wrong = Wrong(loops.baseline_network(denoiser))
    check = gate.loops_and_engine(denoiser, wrong, loops.Sampling(Schedule(4, 0.5)), CPU)
    assert check.against in ("the reference, batched", "the reference, one at a time")
    with pytest.raises(AssertionError, match=r"0\.001 allowed"):
        check.hold()


@pytest.mark.parametrize(("chains", "wrong", "close"), [(4, 0, True), (4, 1, True), (4, 2, False), (3, 1, False)])
def test_of_enough_chains_one_may_differ(chains, wrong, close):
    expected = torch.zeros(chains, 1, 2, 2)
    found = expected + 1e-6
    found[:wrong] = 0.5
    check = gate.closeness(found, expected, "zeros")
    assert (check.difference <= check.tolerance) is close
    assert (check.difference == pytest.approx(1e-6)) is close


def test_none_may_be_undefined():
    found = torch.zeros(9, 1, 2, 2)
    found[3, 0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="inf off"):
        gate.closeness(found, torch.zeros(9, 1, 2, 2), "zeros").hold()


def test_a_compiled_network_is_compared_with_the_eager_one(denoiser):
    network, x = loops.baseline_network(denoiser), subjects.samples(denoiser, 3, CPU)
    assert gate.compiled(network, network, x).difference == 0
    assert gate.compiled(Wrong(network), network, x).difference == pytest.approx(0.02, rel=1e-3)


def test_a_lower_precision_may_be_off_by_twice_what_plain_torch_is():
    exact = randomise(PatchTransformer(TINY), seed=0)
    network = loops.baseline_network(exact).to(torch.bfloat16)
    model = randomise(PatchTransformer(TINY), seed=0).to(torch.bfloat16)
    gate.lower_precision(model, network, exact).hold()
    other = randomise(PatchTransformer(TINY), seed=1)
    with pytest.raises(AssertionError, match="allowed"):
        gate.lower_precision(other, network, exact).hold()
