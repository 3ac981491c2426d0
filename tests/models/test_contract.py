"""What a model or a mask policy does against its contract is named, in the engine, its graphs and the reference."""

import warnings
from functools import partial

import pytest
import torch
from small_models import TINY, randomise
from torch import nn

import ipr_fast
from ipr_fast import MaskPolicy, PatchGrid, Prediction, Schedule, random_patches, reference
from ipr_fast.models import PatchTransformer, contract
from ipr_fast.sampling.policies import RandomPatches
from ipr_fast.sampling.prediction import mix_range

GRID = PatchGrid(1, 16, 16, 4)
BACKENDS = ["torch", "reference", "graphs"]
SCHEDULE = Schedule(2, 0.5)


class Network(nn.Module):
    """A denoiser of which every test changes one thing."""

    grid = GRID

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), *layers)

    def forward(self, patches, levels, active=None):
        slots = patches if active is None else active.gather(patches)
        return Prediction(self.layers(slots.flatten(0, 1)).view_as(slots), torch.full_like(slots, 0.5))


@pytest.fixture(params=BACKENDS)
def run(request, finished):
    """Refines, by each backend in turn; "graphs" on the tape that stands for a GPU."""
    if request.param == "graphs":
        request.getfixturevalue("tape")

    def refine(model, policy=None, **options):
        policy = random_patches(0.5) if policy is None else policy
        backend = "auto" if request.param == "graphs" else request.param
        options = {"iters": 2, "schedule": SCHEDULE, **options}
        return ipr_fast.refine_batch(finished, policy, model=model, backend=backend, **options)

    return refine


# ------------------------------------------------------------------------------------------------- training mode


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return self._dropped(x)

    def _dropped(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


class ByProperty(nn.Module):
    @property
    def rate(self):
        return 0.5 if getattr(self, "training") else 0.0  # noqa: B009 - as some do

    def forward(self, x):
        return nn.functional.dropout(x, self.rate)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.5), r"Dropout \(layers\.1\)"),
        (nn.BatchNorm1d(16), r"BatchNorm1d \(layers\.1\)"),
        (FunctionalDropout(), r"FunctionalDropout \(layers\.1\)"),
        (Decorated(), r"Decorated \(layers\.1\)"),
        (ByProperty(), r"ByProperty \(layers\.1\)"),
        (nn.utils.spectral_norm(nn.Linear(16, 16)), r"Linear \(layers\.1\)"),
        (nn.RReLU(), r"RReLU \(layers\.1\)"),
    ],
)
def test_a_model_in_training_mode_is_refused_by_name(run, layer, name):
    model = Network(layer).train()
    with pytest.raises(ValueError, match=rf"model: its {name}.* is in training mode.*call model\.eval\(\)"):
        run(model)
    assert run(model.eval()).isfinite().all()


def test_a_network_in_training_mode_within_a_plain_object_is_refused():
    class Adapter:
        grid = GRID

        def __init__(self, network):
            self.network = network

        def __call__(self, patches, levels, active=None):
            return self.network(patches, levels, active)

    network = Network(nn.Dropout(0.5))

    def closure(patches, levels, active=None):
        return network(patches, levels, active)

    in_list = Network()
    in_list.others = [network]
    bound = partial(lambda network, *arguments: network(*arguments), network)
    closure.grid = bound.grid = GRID
    for model in (Adapter(network), Adapter([network]), closure, bound, in_list.eval()):
        network.train()
        with pytest.raises(ValueError, match=r"its Dropout \(.*layers\.1\) is in training mode"):
            contract.denoiser(model)
        network.eval()
        contract.denoiser(model)


def test_a_norm_over_the_batch_is_refused_in_either_mode():
    model = Network(nn.BatchNorm1d(16, track_running_stats=False))
    with pytest.raises(ValueError, match=r"BatchNorm1d \(layers\.1\) takes the statistics of the batch"):
        contract.denoiser(model.eval())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_layer_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"RecursiveScriptModule \(layers\.1\) is in training mode"):
        contract.denoiser(Network(torch.jit.script(nn.Dropout(0.5))).train())


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.InstanceNorm1d(16), nn.LayerNorm(16), nn.GELU()])
def test_layers_that_are_the_same_in_training_mode_are_no_reason_to_refuse(layer):
    contract.denoiser(Network(layer).train())


def test_training_mode_is_refused_when_generating_and_by_the_reference_itself():
    model = Network(nn.Dropout(0.5)).train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        ipr_fast.generate_batch(2, model=model)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        reference.regenerate(
            model, torch.zeros(16, 16), torch.ones(16, dtype=torch.bool), SCHEDULE, stochasticity=0.5, noise=torch.zeros
        )


def test_the_packages_own_models_may_be_in_either_mode():
    contract.denoiser(randomise(PatchTransformer(TINY), seed=0).train())


# ------------------------------------------------------------------------------------------------- written inputs


class Writer(Network):
    def __init__(self, write, method="forward"):
        super().__init__()
        self.write, self.method = write, method

    def forward(self, patches, levels, active=None):
        self.write(patches, levels, active)
        return super().forward(patches, levels, active)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("patches", lambda patches, levels, active: patches.clamp_(-0.1, 0.1)),
        ("patches", lambda patches, levels, active: patches[0, 0].zero_()),
        ("levels", lambda patches, levels, active: levels.mul_(0.5)),
        ("active.index", lambda patches, levels, active: active.index.clamp_(min=0)),
        ("active.count", lambda patches, levels, active: active.count.add_(1)),
    ],
)
def test_a_model_that_writes_into_its_inputs_is_named(run, name, write, inference):
    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match=rf"model: Writer writes into its input `{name}`"),
    ):
        run(Writer(write))


def test_writes_in_prepare_and_tabulate_are_named(finished):
    class Prepared(Network):
        def prepare(self, patches, active, out=None):
            patches.zero_()
            return torch.zeros(1)

        def forward(self, patches, levels, active=None, context=None):
            return super().forward(patches, levels, active)

    class Tabulated(Network):
        def tabulate(self, levels, out=None):
            return levels.mul_(2)

        def forward(self, patches, levels, active=None, table=None):
            return super().forward(patches, levels, active)

    for model, name in ((Prepared(), "patches"), (Tabulated(), "levels")):
        with pytest.raises(ValueError, match=rf"model: {type(model).__name__} writes into its input `{name}`"):
            ipr_fast.refine_batch(finished, random_patches(0.5), 1, model=model)


# ---------------------------------------------------------------------------------------------- the variance mix


class Logits(Network):
    """Forgets the sigmoid."""

    def __init__(self, size=3.0):
        super().__init__()
        self.size = size

    def forward(self, patches, levels, active=None):
        prediction = super().forward(patches, levels, active)
        mix = torch.full_like(prediction.velocity, 0.5)
        mix[..., 0] = -self.size
        return prediction._replace(variance_mix=mix)


def test_a_mix_outside_its_bounds_gets_a_warning(run):
    with pytest.warns(RuntimeWarning, match=r"variance mix of Logits lies in \[-3, 0\.5\], expected \[0, 1\].*sigmoid"):
        run(Logits())


def test_generating_warns_of_a_mix_too():
    with pytest.warns(RuntimeWarning, match=r"variance mix of Logits lies in \[-3, 0\.5\]"):
        ipr_fast.generate_batch(2, model=Logits(), schedule=SCHEDULE)


def test_a_mix_within_the_models_own_bounds_gets_none(finished):
    model = Logits(size=0.5)
    model.mix_bounds = (-1.0, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, schedule=SCHEDULE)


def test_padding_slots_may_hold_any_mix():
    mix = torch.tensor([[[0.2], [9.0]], [[0.7], [0.4]]])
    found = mix_range(mix, torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.7]))


# ------------------------------------------------------------------------------------------------ optional methods


def test_methods_of_the_same_name_for_another_purpose_are_left_alone(run):
    class Busy(Network):
        def prepare(self):
            raise AssertionError

        def tabulate(self, rows):
            raise AssertionError

    torch.manual_seed(0)
    busy = Busy()
    assert not contract.prepares(busy)
    assert not contract.tabulates(busy)
    run(busy)


@pytest.mark.parametrize(
    ("method", "keyword", "wanted"),
    [("prepare", "context", r"prepare\(patches, active, out=None\)"), ("tabulate", "table", r"tabulate\(levels, out")],
)
def test_a_method_of_another_signature_is_named(finished, method, keyword, wanted):
    class Odd(Network):
        def forward(self, patches, levels, active=None, **more):
            return super().forward(patches, levels, active)

    setattr(Odd, method, lambda self: None)
    with pytest.raises(ValueError, match=rf"Odd\.{method} must be {wanted}.*takes `{keyword}`; got {method}\(\)"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=Odd())


# --------------------------------------------------------------------------------------------------- mask policies


class Policy(MaskPolicy):
    """Chooses the first patches, as many as `size`."""

    size = 2

    def sizes(self, free):
        return torch.full((len(free),), self.size)

    def choose(self, free, *, seed, iteration, chain_ids):
        return (torch.arange(16) < self.size).expand(len(free), -1)


@pytest.fixture
def transformer():
    return randomise(PatchTransformer(TINY), seed=0)


def test_a_policy_that_chooses_more_than_its_sizes_is_named(run, transformer):
    class Greedy(Policy):
        def choose(self, free, **more):
            return (torch.arange(16) < 5).expand(len(free), -1)

    with pytest.raises(ValueError, match=r"mask policy .*Greedy.*`choose` returned up to 3 patches more.*`sizes`"):
        run(transformer, Greedy())
    run(transformer, Policy())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["free", "iteration", "chain_ids"])
def test_a_policy_that_writes_into_its_inputs_is_named(run, transformer, name, inference):
    class Rude(Policy):
        def choose(self, free, **more):
            {"free": free, **more}[name].zero_()
            return super().choose(free, **more)

    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match=rf"mask policy .*Rude writes into its input `{name}`"),
    ):
        run(transformer, Rude(), chain_ids=torch.arange(12) + 1)


def test_sizes_that_write_are_named(run, transformer):
    class Rude(Policy):
        def sizes(self, free):
            free.zero_()
            return super().sizes(free)

    with pytest.raises(ValueError, match=r"mask policy .*Rude writes into its input `free`"):
        run(transformer, Rude())


def test_what_a_policy_raises_before_any_work_is_a_value_error(run, transformer):
    class Broken(Policy):
        def sizes(self, free):
            return {}["x"]

    with pytest.raises(ValueError, match=r"mask policy .*Broken: sizes raised KeyError: 'x'"):
        run(transformer, Broken())

    class Unbound(Policy):
        def bind(self, grid, batch, device):
            self.grid = grid

    with pytest.raises(ValueError, match=r"mask policy .*Unbound: bind must return a MaskPolicy, got NoneType"):
        run(transformer, Unbound())


def test_a_subclass_of_random_patches_makes_its_own_choice(run, transformer, finished):
    class FirstPatches(RandomPatches):
        def choose(self, free, **more):
            return (torch.arange(16) < 2).expand(len(free), -1)

    refined = run(transformer, FirstPatches(0.25))
    changed = (GRID.to_patches(refined) != GRID.to_patches(finished)).any(-1)
    assert changed[:, :2].all()
    assert not changed[:, 2:].any()


# ----------------------------------------------------------------------------------------------- values and devices


@pytest.mark.parametrize(
    ("scale", "shift", "found"),
    [(0.5, 0.5, r"\[0, 1\]"), (127.5, 127.5, r"\[0, 255\]"), (128.0, 0.0, r"\[-128, 128\]")],
)
def test_samples_in_another_range_get_a_warning(transformer, finished, scale, shift, found):
    x = finished * scale + shift
    with pytest.warns(RuntimeWarning, match=rf"x lies in {found}, but PatchTransformer was trained on .*\[-1, 1\]"):
        ipr_fast.refine_batch(x, random_patches(), 1, model=transformer, schedule=SCHEDULE)
    known = torch.ones(12, 16, dtype=torch.bool)
    known[:, 0] = False
    with pytest.warns(RuntimeWarning, match=r"known_values lies in"):
        ipr_fast.generate_batch(12, model=transformer, known=known, known_values=x, schedule=SCHEDULE)


def test_samples_that_may_be_in_the_range_get_no_warning(transformer, finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (finished, finished * 1.5, torch.zeros_like(finished), finished[:0], -torch.ones_like(finished)):
            ipr_fast.refine_batch(x, random_patches(), 1, model=transformer, schedule=SCHEDULE)
        none_known = torch.zeros(12, 16, dtype=torch.bool)
        ipr_fast.generate_batch(
            12, model=transformer, known=none_known, known_values=finished + 9, schedule=SCHEDULE, stochasticity=0.0
        )


def test_a_model_without_a_range_gets_no_warning(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipr_fast.refine_batch(finished + 50, random_patches(), 1, model=Network(), schedule=SCHEDULE)


def test_gradients_in_a_model_are_named_with_what_to_do(run):
    class Guided(Network):
        def forward(self, patches, levels, active=None):
            z = patches.detach().requires_grad_()
            torch.autograd.grad(z.square().sum(), z)
            return super().forward(patches, levels, active)

    with pytest.raises(ValueError, match=r"Guided computes gradients.*inference_mode\(False\), torch\.enable_grad\(\)"):
        run(Guided())


def test_gradients_as_the_advice_has_them_work(run):
    class Guided(Network):
        def forward(self, patches, levels, active=None):
            with torch.inference_mode(False), torch.enable_grad():
                z = patches.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(z.square().sum(), z)
            return super().forward(patches - 0.01 * gradient, levels, active)

    assert run(Guided()).isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_torchs_default_device_makes_no_difference(transformer, finished, backend):
    def refine():
        results = [
            ipr_fast.refine_batch(finished, policy, 2, model=transformer, backend=backend, schedule=SCHEDULE)
            for policy in (random_patches(), ipr_fast.fixed_patches([1, 2]), ipr_fast.all_patches())
        ]
        return [*results, ipr_fast.generate_batch(2, model=transformer, backend=backend, schedule=SCHEDULE)]

    expected = refine()
    torch.set_default_device("meta")
    try:
        found = refine()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
