"""Guards around user code: training mode, written inputs and gradients are named."""

import gc
import time
import weakref
from functools import partial

import pytest
import torch
from small_models import TINY, Network, randomise
from torch import nn

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, generate_batch, random_patches, reference
from ipr_fast.models import PatchTransformer, contract
from ipr_fast.sampling import user_code

GRID = PatchGrid(1, 16, 16, 4)
SCHEDULE = Schedule(2, 0.5)


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


def dropped(module, x):
    return nn.functional.dropout(x, 0.5, module.training)


class ByHelper(nn.Module):
    def forward(self, x):
        return dropped(self, x)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Dropout(0.5), r"Dropout \(layers\.1\)"),
        (nn.BatchNorm1d(16), r"BatchNorm1d \(layers\.1\)"),
        (FunctionalDropout(), r"FunctionalDropout \(layers\.1\)"),
        (Decorated(), r"Decorated \(layers\.1\)"),
        (ByProperty(), r"ByProperty \(layers\.1\)"),
        (ByHelper(), r"ByHelper \(layers\.1\)"),
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


GLOBAL_NETWORK = Network(nn.Dropout(0.5))
UNUSED_NETWORK = Network(nn.Dropout(0.5)).train()


class ReadsAGlobal:
    grid = GRID

    def __call__(self, patches, levels, active=None):
        return GLOBAL_NETWORK(patches, levels, active)


def reads_a_global_through_a_function(patches, levels, active=None):
    return ReadsAGlobal.__call__(None, *prepared(patches, levels, active))


def prepared(*arguments):
    return arguments if GLOBAL_NETWORK is not None else None


reads_a_global_through_a_function.grid = GRID


class WithSlots:
    __slots__ = ("UNUSED_NETWORK", "_network")
    grid = GRID

    def __init__(self, network):
        self._network = network

    def __call__(self, patches, levels, active=None):
        return self._network(patches, levels, active)


class WithAPrivateAttribute(ReadsAGlobal):
    def __init__(self, network):
        self._networks = {"_first": network}

    def __call__(self, patches, levels, active=None):
        return self._networks["_first"](patches, levels, active)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (ReadsAGlobal(), "GLOBAL_NETWORK"),
        (reads_a_global_through_a_function, r"prepared\.GLOBAL_NETWORK"),
        (ReadsAGlobal().__call__, "GLOBAL_NETWORK"),
        (WithSlots(GLOBAL_NETWORK), "_network"),
        (WithAPrivateAttribute(GLOBAL_NETWORK), r"_networks\._first"),
    ],
    ids=["global", "function", "method", "slots", "private"],
)
def test_a_network_in_training_mode_is_found_wherever_the_model_keeps_it(model, path):
    GLOBAL_NETWORK.train()
    with pytest.raises(ValueError, match=rf"its Dropout \({path}\.layers\.1\) is in training mode"):
        user_code.check_eval_mode(model)
    GLOBAL_NETWORK.eval()
    user_code.check_eval_mode(model)  # the other global network is not the model's


def test_a_model_is_checked_again_by_the_modules_that_it_had():
    model = Network(nn.Dropout(0.5)).eval()
    mode = user_code.EvalMode(model)
    mode.check()
    model.layers[1].train()
    with pytest.raises(ValueError, match=r"its Dropout \(layers\.1\) is in training mode"):
        mode.check()
    harmless = Network(nn.Dropout(0.0)).train()
    user_code.EvalMode(harmless).check()


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


@pytest.mark.parametrize("where", ["callback", "mask_fn"])
def test_a_model_that_user_code_puts_into_training_mode_is_refused(run, finished, where):
    model = Network(nn.Dropout(0.5)).eval()

    def trains(*_):
        model.train()
        return torch.ones(len(finished), 16, dtype=torch.bool) if where == "mask_fn" else None

    options = {"policy": trains} if where == "mask_fn" else {"callback": trains}
    with pytest.raises(ValueError, match=r"its Dropout \(layers\.1\) is in training mode.*call model\.eval\(\)"):
        run(model, **options)


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


# ----------------------------------------------------------------------------------------------------- gradients


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


def test_a_class_that_was_looked_at_can_be_collected():
    """With what its functions hold: a class made in a function keeps that function's variables."""

    def look():
        class Own(nn.Module):
            grid = GRID

            def forward(self, patches, levels, active=None):
                return Prediction(patches if active is None else active.gather(patches))

        generate_batch(1, model=Own(), schedule=SCHEDULE)
        return weakref.ref(Own)

    kept = look()
    gc.collect()
    assert kept() is None


def test_long_lists_are_not_searched_to_their_end():
    model = nn.Module()
    model.numbers = [[0.0] * 1000 for _ in range(1000)]
    model.last = nn.Dropout()
    model.train()
    assert sum(1 for _ in user_code._modules_of(model)) == 2
    model.eval()
    began = time.process_time()
    user_code.check_eval_mode(model)
    assert time.process_time() - began < 0.2
