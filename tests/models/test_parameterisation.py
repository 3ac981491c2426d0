"""Networks of other conventions: flows against their definitions, predictions against the velocity that they imply."""

import math

import pytest
import torch

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, random_patches
from ipr_fast.models import Parameterised
from ipr_fast.models.flows import CosineFlow, CosineLogSNRFlow, DiscreteFlow, LinearBetaFlow, RectifiedFlow

GRID = PatchGrid(1, 2, 2, 1)
BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)


def logsnr_of(s):
    """Hoogeboom et al. 2023: -2 log tan, between its angles at log-SNR 15 and -15, shifted by log(1/8)^2."""
    first, last = (math.atan(math.exp(-0.5 * logsnr)) for logsnr in (15.0, -15.0))
    return -2 * torch.log(torch.tan(first + s * (last - first))) + 2 * math.log(0.125)


# Each flow with a^2 at its times, and its last time.
FLOWS = {
    "rectified": (RectifiedFlow(), None, 1),
    "cosine": (CosineFlow(), lambda s: torch.cos(torch.pi / 2 * s) ** 2, 1),
    "skewed": (CosineFlow(0.008), lambda s: torch.cos(torch.pi / 2 * (s + 0.008) / 1.008) ** 2, 1),
    "logsnr": (CosineLogSNRFlow(shift=0.125), lambda s: logsnr_of(s).sigmoid(), 1),
    "linear beta": (LinearBetaFlow(), lambda s: torch.exp(-(0.1 * s + 19.9 * s**2 / 2)), 1),
    "slow linear beta": (LinearBetaFlow(1e-4, 2e-2), lambda s: torch.exp(-(1e-4 * s + 1.99e-2 * s**2 / 2)), 1),
    "discrete": (DiscreteFlow((1 - BETAS).cumprod(0)), lambda s: (1 - BETAS).cumprod(0)[s.long()], 999),
}


def weights(name, times):
    """a and b at times, float64, of the definition."""
    alpha_bar = FLOWS[name][1]
    if alpha_bar is None:
        return 1 - times, times
    return alpha_bar(times).sqrt(), (1 - alpha_bar(times)).clamp(min=0).sqrt()


@pytest.mark.parametrize("name", FLOWS)
def test_the_time_of_a_level_is_where_the_flow_has_it(name):
    flow, _, last = FLOWS[name]
    times = torch.linspace(0, last, 1000, dtype=torch.float64)
    times = times.round() if last > 1 else times
    a, b = weights(name, times)
    t = b / (a + b)
    found = flow.time(t.float()).double()
    # A level is known to half a unit of its last place: so far its time may move, and as much again for each of four
    # roundings of what a function of the level computes.
    slope = torch.gradient(times, spacing=(t,))[0].abs()
    allowed = 8 * 2**-24 * (slope * (t + 1e-3) + last)
    assert ((found - times).abs() <= allowed).all()
    torch.testing.assert_close(flow.scale(t.float()).double(), a + b, rtol=8 * 2**-24, atol=0)
    assert flow.max_level == pytest.approx(float(t[-1]), abs=2**-24)


@pytest.mark.parametrize("name", FLOWS)
def test_levels_beyond_a_flow_have_its_first_and_last_time(name):
    flow, _, last = FLOWS[name]
    assert flow.time(torch.tensor([0.0, 1.0])).tolist() == [0, last]


def test_whole_times_are_the_nearest():
    alphas_bar = (1 - BETAS).cumprod(0)
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DiscreteFlow(alphas_bar, whole=True).time(t), DiscreteFlow(alphas_bar).time(t).round())


def test_a_cast_to_half_precision_leaves_the_levels_of_discrete_times():
    flow = DiscreteFlow((1 - BETAS).cumprod(0))
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    expected = flow.time(t)
    assert torch.equal(flow.to(torch.bfloat16).time(t), expected)
    assert torch.equal(flow.half().double().time(t), expected)


class Network:
    """Predicts x = tanh(z) in the scale of its flow, whatever the time, in one convention.

    times: of its last call.
    """

    grid = GRID

    def __init__(self, name, prediction, time_scale=1.0, time_shift=0.0, bare=False):
        self.name, self.prediction, self.bare = name, prediction, bare
        self.time_scale, self.time_shift = time_scale, time_shift

    def __call__(self, patches, times, active=None):
        self.patches, self.times = patches, times
        z = (patches if active is None else active.gather(patches)).double()
        s = (times.double() - self.time_shift) / self.time_scale
        s = s.round() if FLOWS[self.name][2] > 1 else s
        a, b = (each[..., None] for each in weights(self.name, s))
        x = z.tanh()
        eps = (z - a * x) / b.clamp(min=1e-30)
        speed = FLOWS[self.name][0].speed
        of_flow = eps - x if self.name == "rectified" else (speed or 0) * (a * eps - b * x)
        made = {"velocity": of_flow, "eps": eps, "x0": x, "v": a * eps - b * x}[self.prediction].float()
        return made if self.bare else Prediction(made, None, made.mean(-1))


CASES = [
    (name, prediction)
    for name, (flow, _, _) in FLOWS.items()
    for prediction in ("velocity", "eps", "x0", "v")
    if prediction != "velocity" or flow.speed is not None
]


@pytest.mark.parametrize(("name", "prediction"), CASES)
@pytest.mark.parametrize("bare", [False, True])
def test_the_velocity_is_that_of_the_prediction(name, prediction, bare, generator):
    """Also above the largest level: there of x at that level, by the noise scaled down to it."""
    flow, largest = FLOWS[name][0], 0.75
    model = Parameterised(Network(name, prediction, bare=bare), prediction, flow, max_level=largest)
    levels = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    if name == "discrete":  # at levels of whole times
        a, b = weights(name, torch.tensor([100.0, 300, 600, 600]).double())
        levels = (b / (a + b)).float()[None].clone()
        levels[0, 3], model.max_level = 1, levels[0, 2].item()
    if name == "slow linear beta":  # whose last level is 0.09
        levels = levels * 0.08
        model.max_level = 0.06
    z = torch.randn(1, 4, 1, generator=generator)
    found = model(z, levels).velocity
    t = levels.double()[..., None].clamp(max=model.max_level)
    a_plus_b = (t.square() + (1 - t).square()).rsqrt() if flow.preserves_variance else 1.0
    x = (a_plus_b * z.double() * (t / levels[..., None])).tanh()
    expected = (z.double() - x) / levels.double()[..., None]
    # The factors of z and of the prediction are at most 1 / t and 1 / (1 - t), of ten roundings each.
    allowed = 10 * 2**-24 * (1 + z.abs()) * (1 / levels + 1 / (1 - t.squeeze(-1)))[..., None] ** 2
    assert ((found.double() - expected).abs() <= allowed).all()


def test_context_is_clean_and_slots_are_in_the_networks_scale(generator):
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    active = ipr_fast.sampling.patches.ActivePatches.from_mask(mask, 2)
    network = Network("cosine", "v", 1000.0, -1.0)
    model = Parameterised(network, "v", CosineFlow(), time_scale=1000, time_shift=-1)
    z, levels = torch.randn(2, 4, 1, generator=generator), torch.tensor([[0.5, 0.2], [0.9, 0.0]])
    found = model(z, levels, active)
    assert found.velocity.shape == (2, 2, 1)
    assert torch.equal(network.patches[~mask], z[~mask])
    assert network.patches[0, 0] == pytest.approx(z[0, 0] * 2**0.5, rel=1e-6)  # a = b at level one half
    assert network.times[0, 0].item() == pytest.approx(1000 * 0.5 - 1, rel=1e-6)
    whole = active.scatter(levels, 4)
    torch.testing.assert_close(found.velocity[0], model(z, whole).velocity[0, [0, 2]])


def test_check_model_passes_and_runs_agree_with_the_reference():
    model = Parameterised(Network("linear beta", "eps"), "eps", LinearBetaFlow())
    ipr_fast.check_model(model)
    runs = [
        ipr_fast.refine_batch(
            torch.zeros(3, 1, 2, 2), random_patches(0.5), 2, model=model, schedule=Schedule(5, 0.5), backend=backend
        )
        for backend in ("torch", "reference")
    ]
    assert runs[0].isfinite().all()
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("flow", [RectifiedFlow(), CosineFlow()], ids=["rectified", "cosine"])
def test_noise_predicted_at_pure_noise_is_named_at_once(flow):
    with pytest.raises(
        ValueError, match=r"max_level must be given, the largest level < 1 that the network was trained"
    ):
        Parameterised(Network("cosine", "eps"), "eps", flow)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("noise",), "prediction must be one of velocity, eps, x0, v, got 'noise'"),
        (("velocity", LinearBetaFlow()), "prediction must be one of eps, x0, v for a LinearBetaFlow"),
        (("v", "cosine"), "flow must be a Flow of ipr_fast.models.flows, got str"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Parameterised(Network("cosine", "v"), *arguments)


def test_a_condition_that_the_network_does_not_take_is_named():
    model = Parameterised(Network("cosine", "v"), "v", CosineFlow())
    with pytest.raises(ValueError, match="condition: Network takes none"):
        ipr_fast.generate_batch(2, model=model, schedule=Schedule(2), condition=torch.arange(2))


@pytest.mark.parametrize("alphas_bar", [torch.tensor([0.5]), torch.tensor([0.5, 0.6]), torch.tensor([1.5, 0.6])])
def test_alphas_that_do_not_fall(alphas_bar):
    with pytest.raises(ValueError, match=r"alphas_bar must fall .*; of betas, it is \(1 - betas\)\.cumprod\(0\)"):
        DiscreteFlow(alphas_bar)


@pytest.mark.parametrize("value", ["abc", None])
def test_alphas_that_are_no_numbers(value):
    with pytest.raises(ValueError, match=rf"^alphas_bar must be a tensor \(T,\), got {type(value).__name__}"):
        DiscreteFlow(value)


def test_betas_have_a_largest_value():
    with pytest.raises(ValueError, match=r"^high must be a finite number in \[1e-09, 700\], got 10000.0"):
        LinearBetaFlow(0.1, 1e4)
    assert LinearBetaFlow(700, 700).max_level == 1
