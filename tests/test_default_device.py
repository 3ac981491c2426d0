"""torch.set_default_device makes no difference: every tensor is made on a device that the code names."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_token_models import Lookup

import ipr_fast
from ipr_fast.files import Samples, read_samples, write_samples
from ipr_fast.tasks import digits, grids
from ipr_fast.tasks.catalog import TASKS, make_task
from ipr_fast.training.configs import config_of
from ipr_fast.training.trainer import Trainer, TrainSettings

ROOT = Path(ipr_fast.__file__).parents[1]
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"scalar_tensor", "tensor", "zeros"}
# Parameters of a network are made on the default device, as those of torch's own layers are.
PARAMETERS = {"ipr_fast/models/transformer_layers.py", "ipr_fast/models/pixel_networks.py"}


def makes_a_tensor(node):
    """Whether a node is a call such as torch.zeros(...)."""
    function = node.func if isinstance(node, ast.Call) else None
    of_torch = isinstance(function, ast.Attribute) and getattr(function.value, "id", None) == "torch"
    return of_torch and function.attr in FACTORIES


@pytest.mark.parametrize("folder", ["ipr_fast", "kernels"])
def test_every_new_tensor_is_on_a_named_device(folder):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in PARAMETERS
        for node in ast.walk(ast.parse(path.read_text()))
        if makes_a_tensor(node) and not any(keyword.arg == "device" for keyword in node.keywords)
    ]
    assert found == []


def results_of_calls(model, x, backend):
    schedule = ipr_fast.Schedule(2, 0.5)
    policies = ipr_fast.random_patches(), ipr_fast.fixed_patches([1, 2]), ipr_fast.all_patches()
    yield from (
        ipr_fast.refine_batch(x, policy, 2, model=model, backend=backend, schedule=schedule) for policy in policies
    )
    yield ipr_fast.generate_batch(2, model=model, backend=backend, schedule=schedule)


def results_of_a_task(name):
    for cached in (digits._load_optical_digits, grids.all_grids, grids._base_grids):
        cached.cache_clear()
    task = make_task(name)
    samples = task.sample(2, torch.Generator("cpu").manual_seed(0))
    yield samples
    report = task.judge()(samples)
    yield from (report.good, *report.measures().values())
    task.config = replace(config_of(task), width=48, depth=1, num_heads=1)
    trainer = Trainer(task, TrainSettings(steps=1, batch_size=2))
    yield torch.stack(list(trainer.train_step())).detach()
    yield from trainer.ema.state_dict().values()


def results_of_files(folder, model):
    for name in ("x.npy", "x.npz", "x.pt", "pictures"):
        write_samples(folder / name, Samples(torch.arange(-1, 1, 1 / 64, device="cpu").view(1, 1, 8, 16)))
        yield read_samples(folder / name).images
    ipr_fast.save_model(model, folder / "m.safetensors")
    yield from ipr_fast.load_model(folder / "m.safetensors").state_dict().values()


def with_and_without_a_default_device(results):
    """The results of a function of no arguments, twice."""
    expected = list(results())
    torch.set_default_device("meta")
    try:
        found = list(results())
    finally:
        torch.set_default_device(None)
    return zip(found, expected, strict=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_refinement_and_generation(model, finished, backend):
    pairs = with_and_without_a_default_device(lambda: results_of_calls(model, finished, backend))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_and_training(name, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(grids, "BASE_GRIDS", 50)
    assert all(torch.equal(a, b) for a, b in with_and_without_a_default_device(lambda: results_of_a_task(name)))


def test_files(tmp_path, model):
    pairs = with_and_without_a_default_device(lambda: results_of_files(tmp_path, model))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_check_of_a_model(model):
    ((found, expected),) = with_and_without_a_default_device(lambda: [ipr_fast.check_model(model)])
    assert found == expected


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_default_type_of_numbers_changes_nothing(backend, model):
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            ipr_fast.check_model(model)
            options = {"schedule": ipr_fast.Schedule(1), "callback": lambda step, x: None, "backend": backend}
            found.append(ipr_fast.generate_batch(2, model=model, **options))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.8}, {"reveal": "independent", "remask": "conf"}], ids=str
)
def test_the_default_type_of_numbers_changes_no_token(backend, options):
    class Float32(Lookup):
        def __call__(self, tokens, active):
            logits = self.table[torch.arange(self.length), tokens].sum(1)
            return ipr_fast.TokenPrediction(active.gather(logits))

    found, model = [], Float32()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            schedule = ipr_fast.TokenSchedule(5, **options)
            found.append(ipr_fast.generate_batch(40, model=model, schedule=schedule, backend=backend))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[0], each) for each in found[1:])
