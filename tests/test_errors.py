"""Every bad input gets a ValueError that names the argument, before any work."""

import sys

import pytest
import torch
from small_models import Network

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, files, random_patches, resolve
from ipr_fast.errors import BrokenExtra, MissingExtra
from ipr_fast.evaluation import plots
from ipr_fast.models.files import sources
from ipr_fast.sampling.policies import RandomPatches
from ipr_fast.tasks import digits

X = torch.zeros(3, 1, 16, 16)
MASK = torch.zeros(3, 16, dtype=torch.bool)
NAN, INF = X.clone(), X.clone()
NAN[1, 0, 2, 3], INF[2, 0, 0, 0] = float("nan"), float("-inf")
META = torch.device("meta")

REFINE = [
    ("x", {"x": [1.0]}, "list"),
    ("x", {"x": X[0]}, r"\(1, 16, 16\)"),
    ("x", {"x": X.long()}, "torch.int64"),
    ("x", {"x": X.to(torch.complex64)}, "complex"),
    ("x", {"x": X[:, :, :8]}, r"\(B, 1, 16, 16\).*got \(3, 1, 8, 16\)"),
    ("x", {"x": NAN}, "NaN or inf in 1 of its samples"),
    ("x", {"x": INF}, "NaN or inf"),
    ("x", {"x": X.double() + 1e300}, "finite in float32"),
    ("x", {"x": X.to_sparse()}, "sparse"),
    ("x", {"x": X.to(torch.float8_e4m3fn)}, "float8"),
    ("x", {"x": X.to(META)}, "meta device"),
    ("mask_fn", {"mask_fn": None}, "NoneType"),
    ("mask_fn", {"mask_fn": MASK}, "Tensor"),
    ("mask_fn", {"mask_fn": random_patches}, r"call it: random_patches\("),
    ("mask_fn", {"mask_fn": RandomPatches}, "must be an instance of a policy, got the class RandomPatches"),
    ("iters", {"iters": -1}, "-1"),
    ("iters", {"iters": 2.5}, "2.5"),
    ("iters", {"iters": True}, "True"),
    ("model", {"model": lambda patches, levels, active: None}, "function"),
    ("model", {"model": 3}, "int"),
    ("known", {"known": MASK[:2]}, r"\(3, 16\) or \(3, 4, 4\), got \(2, 16\)"),
    ("known", {"known": MASK.float()}, "torch.float32"),
    ("known", {"known": [[True]]}, "list"),
    ("known", {"known": MASK.to(META)}, "must be on cpu, got meta"),
    ("schedule", {"schedule": (3, 0.0)}, "tuple"),
    ("schedule", {"schedule": Schedule(40_000, 0.0)}, "65536"),
    ("stochasticity", {"stochasticity": 1.1}, "1.1"),
    ("stochasticity", {"stochasticity": -0.1}, "-0.1"),
    ("stochasticity", {"stochasticity": float("nan")}, "nan"),
    ("temperature", {"temperature": -1.0}, "-1.0"),
    ("temperature", {"temperature": float("inf")}, "inf"),
    ("temperature", {"temperature": 1e300}, r"in \[0, 1000\], got 1e\+300"),
    ("seed", {"seed": -1}, "-1"),
    ("seed", {"seed": 2**64}, str(2**64)),
    ("seed", {"seed": "0"}, "'0'"),
    ("chain_ids", {"chain_ids": torch.arange(2)}, r"\(3,\), got \(2,\)"),
    ("chain_ids", {"chain_ids": torch.zeros(3)}, "torch.float32"),
    ("chain_ids", {"chain_ids": [0, 1, 2]}, "list"),
    ("chain_ids", {"chain_ids": torch.tensor([0, 1, -1])}, "-1"),
    ("chain_ids", {"chain_ids": torch.tensor([0, 1, 2**32])}, str(2**32)),
    ("chain_ids", {"chain_ids": torch.arange(3, device=META)}, "must be on cpu, got meta"),
    ("first_iteration", {"first_iteration": 0}, "0"),
    ("first_iteration", {"first_iteration": 2**32}, "4294967295"),
    ("callback", {"callback": 3}, "int"),
    ("noise", {"noise": "fresh"}, "'fresh'"),
    ("noise", {"noise": X}, "tensor"),
    ("backend", {"backend": "cuda"}, "'cuda'"),
    ("backend", {"backend": []}, r"\[\]"),
]

GENERATE = [
    ("batch_size", {"batch_size": -1}, "-1"),
    ("batch_size", {"batch_size": 2.0}, "2.0"),
    ("batch_size", {"batch_size": 2**45}, "in 0..4294967296, got 35184372088832"),
    ("batch_size", {"batch_size": 2**32}, "4294967296 samples take at least 8192 GiB on cpu"),
    ("known and known_values", {"known": MASK}, "together"),
    ("known and known_values", {"known_values": X}, "together"),
    ("known_values", {"known": MASK, "known_values": X[:2]}, "got 2"),
    ("known_values", {"known": ~MASK, "known_values": NAN}, "NaN"),
    ("known_values", {"known": MASK, "known_values": X.int()}, "int32"),
    ("known_values", {"known": MASK, "known_values": X[..., :8]}, r"\(3, 1, 16, 8\)"),
    ("known", {"known": MASK[:, :15], "known_values": X}, r"\(3, 15\)"),
    ("schedule", {"schedule": 3}, "int"),
    ("stochasticity", {"stochasticity": 2}, "2"),
    ("stochasticity", {"stochasticity": 10**400}, "10000"),
    ("seed", {"seed": -5}, "-5"),
    ("chain_ids", {"chain_ids": torch.arange(4)}, r"got \(4,\)"),
    ("backend", {"backend": None}, "None"),
    ("device", {"device": "warp"}, "'warp'"),
    ("device", {"device": "cuda:77"}, "'cuda:77'"),
    ("device", {"device": 3.5}, "3.5"),
    ("device", {"device": "meta"}, "holds no data"),
]


class Forbidden:
    """A Denoiser that must not be called."""

    grid = PatchGrid(1, 16, 16, 4)

    def __call__(self, *args, **kwargs):
        raise AssertionError("work was begun on bad input")


@pytest.mark.parametrize(("argument", "bad", "came"), REFINE, ids=lambda v: v if isinstance(v, str) else "")
def test_refine_batch_refuses(argument, bad, came):
    options = {"x": X, "mask_fn": random_patches(), "iters": 2, "model": Forbidden()} | bad
    with pytest.raises(ValueError, match=rf"(?s)^{argument}.*{came}"):
        ipr_fast.refine_batch(**options)


@pytest.mark.parametrize(("argument", "bad", "came"), GENERATE, ids=lambda v: v if isinstance(v, str) else "")
def test_generate_batch_refuses(argument, bad, came):
    with pytest.raises(ValueError, match=rf"(?s)^{argument}.*{came}"):
        ipr_fast.generate_batch(**({"batch_size": 3, "model": Forbidden()} | bad))


def test_a_model_on_another_device_is_refused():
    elsewhere = Network().to(META)
    with pytest.raises(ValueError, match="model must be on cpu, where the samples are, got meta"):
        ipr_fast.refine_batch(X, random_patches(), 1, model=elsewhere)


def test_a_model_without_data_is_refused_when_generating():
    with pytest.raises(ValueError, match="model must hold data, got parameters on the meta device"):
        ipr_fast.generate_batch(2, model=Network().to(META))


def test_more_patches_than_the_counters_hold_are_refused():
    class Wide(Forbidden):
        grid = PatchGrid(1, 257, 256, 1)

    with pytest.raises(ValueError, match="at most 65536 patches can be counted, got 65792"):
        ipr_fast.refine_batch(torch.zeros(1, 1, 257, 256), random_patches(), 1, model=Wide(), schedule=Schedule(1, 1.0))


def test_more_numbers_in_a_patch_than_the_counters_hold_are_refused():
    class Large(Forbidden):
        grid = PatchGrid.of((1, 2, 2**15, 2**15), (2, 2**15, 2**15))

    with pytest.raises(ValueError, match="model: at most 1073741824 numbers a patch can be counted, got 2147483648"):
        ipr_fast.generate_batch(1, model=Large())


def test_a_schedules_table_that_does_not_fit_into_memory_is_refused(monkeypatch):
    class Long(Forbidden):
        grid = PatchGrid.of((1, 2**15), 1)

    monkeypatch.setattr(resolve.memory, "available_bytes", lambda device: 8 * 2**30)
    with pytest.raises(ValueError, match=r"^model: the schedule of 32768 patches takes 9 GiB on cpu, which has 8 GiB"):
        ipr_fast.generate_batch(1, model=Long(), schedule=Schedule(3, 1.0))
    with pytest.raises(ValueError, match=r"^model: the schedule of 32768 patches takes 9 GiB on cpu"):
        ipr_fast.refine_batch(torch.zeros(1, 1, 2**15), random_patches(), 1, model=Long(), schedule=Schedule(3, 1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: Schedule(10**30),
        lambda: Schedule(3, 10**400),
        lambda: random_patches(10**400),
        lambda: ipr_fast.TokenSchedule(temperature=10**400),
        lambda: ipr_fast.Metropolis(lambda x: x, 10**400),
    ],
)
def test_numbers_too_large_for_a_float_are_refused(call):
    with pytest.raises(ValueError, match=r"must be .*, got 10000"):
        call()


def test_a_table_of_tokens_that_does_not_fit_into_memory_is_refused(monkeypatch):
    class Long:
        vocabulary, length = ipr_fast.Vocabulary(5, 5), 2**15

        def __call__(self, tokens, active):
            raise AssertionError("work was begun")

    monkeypatch.setattr(resolve.memory, "available_bytes", lambda device: 8 * 2**30)
    with pytest.raises(ValueError, match=r"^model: the schedule of 32768 tokens takes 9 GiB .* use fewer steps"):
        ipr_fast.generate_batch(1, model=Long())


def faulty_mask(x, iteration):
    raise KeyError("no such region")


@pytest.mark.parametrize(
    ("mask_fn", "error", "message"),
    [
        (faulty_mask, RuntimeError, "mask_fn faulty_mask raised KeyError in iteration 1: 'no such region'"),
        (lambda x, i: None, ValueError, r"mask_fn .*<lambda> must be a torch.Tensor, got NoneType"),
        (lambda x, i: torch.zeros(12, 15, dtype=torch.bool), ValueError, r"mask_fn .*\(12, 16\).*got \(12, 15\)"),
        (lambda x, i: torch.zeros(12, 16), ValueError, r"mask_fn .*torch.bool, got torch.float32"),
        (lambda x, i: (torch.eye(16)[:12] > 0).to_sparse(), ValueError, "mask_fn .*dense tensor, got torch.sparse_coo"),
        (lambda x, i: torch.zeros(12, 16, dtype=torch.bool, device=META), ValueError, "mask_fn .*got meta"),
    ],
)
def test_a_faulty_mask_fn_names_itself_and_harms_nothing(model, finished, ragged_known, mask_fn, error, message):
    x, known, ids = finished.clone(), ragged_known.clone(), torch.arange(12)
    with pytest.raises(error, match=message):
        ipr_fast.refine_batch(x, mask_fn, 2, model=model, known=known, chain_ids=ids)
    assert torch.equal(x, finished)
    assert torch.equal(known, ragged_known)
    assert torch.equal(ids, torch.arange(12))


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (lambda i, x: 1 / 0, RuntimeError, "callback .* raised ZeroDivisionError in iteration 1"),
        (lambda i, x: True, ValueError, r"callback .* bool tensor of shape \(12,\), got bool"),
        (lambda i, x: torch.zeros(12), ValueError, "callback .* torch.float32"),
    ],
)
def test_a_faulty_callback_names_itself(model, finished, callback, error, message):
    with pytest.raises(error, match=message):
        ipr_fast.refine_batch(finished, random_patches(), 2, model=model, callback=callback)


def test_the_cause_of_a_faulty_mask_fn_is_kept(model, finished):
    with pytest.raises(RuntimeError) as caught:
        ipr_fast.refine_batch(finished, faulty_mask, 1, model=model)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_passes_through(model, finished):
    def interrupted(x, iteration):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ipr_fast.refine_batch(finished, interrupted, 1, model=model)


def test_a_model_that_returns_the_wrong_thing_is_named(finished):
    class Wrong:
        grid = PatchGrid(1, 16, 16, 4)

        def __init__(self, prediction):
            self.prediction = prediction

        def __call__(self, patches, levels, active=None):
            return self.prediction

    cases = [
        (None, "model must return a Prediction, got NoneType"),
        (torch.zeros(12, 4, 16), "model must return a Prediction, got Tensor"),
        (Prediction(torch.zeros(12, 16, 16)), r"model .*velocity of shape \(12, 4, 16\), got \(12, 16, 16\)"),
        (Prediction(torch.zeros(12, 4, 16), torch.zeros(12, 4)), r"variance_mix of shape \(12, 4, 16\)"),
        (Prediction(torch.zeros(12, 4, 16), None, torch.zeros(12, 16)), r"log_variance of shape \(12, 4\)"),
        (Prediction(torch.zeros(12, 4, 16, dtype=torch.int64)), "floating-point velocity .* torch.int64"),
    ]
    for prediction, message in cases:
        with pytest.raises(ValueError, match=message):
            ipr_fast.refine_batch(finished, random_patches(), 1, model=Wrong(prediction))


EXTRAS = {
    "scikit-learn": ("sklearn", lambda: digits._load_optical_digits.__wrapped__("train")),
    "matplotlib": ("matplotlib", plots.load_pyplot),
    "pillow": ("PIL", lambda: files.check_writable("somewhere", (1, 1, 8, 8))),
    "huggingface_hub": ("huggingface_hub", lambda: sources.find("someone/boards")),
}


class Raising:
    """An importer that raises this error for one package."""

    def __init__(self, package, error):
        self.package, self.error = package, error

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise self.error


def use(package, monkeypatch, error):
    """Use the package where its import raises this error."""
    module, call = EXTRAS[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Raising(module, error), *sys.meta_path])
    call()


@pytest.mark.parametrize("package", EXTRAS)
def test_an_extra_that_is_not_installed_is_called_missing(package, monkeypatch):
    module = EXTRAS[package][0]
    with pytest.raises(
        MissingExtra, match=rf"need {package}: pip install 'ipr-fast\[\w+\]' \(or pip install {package}\)"
    ):
        use(package, monkeypatch, ModuleNotFoundError(f"No module named {module!r}", name=module))


@pytest.mark.parametrize("package", EXTRAS)
@pytest.mark.parametrize(
    "error",
    [
        ImportError("\nlibz.so.1: cannot open shared object file\nmore"),
        ModuleNotFoundError("No module named 'scipy'", name="scipy"),
        AttributeError("module 'numpy' has no attribute 'bool'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_extra_that_cannot_be_imported_is_called_broken_with_the_reason(package, error, monkeypatch):
    reason = rf"\({type(error).__name__}: {str(error).strip().splitlines()[0]}\)"
    with pytest.raises(BrokenExtra, match=rf"need {package}, which is installed but broken {reason}$"):
        use(package, monkeypatch, error)
