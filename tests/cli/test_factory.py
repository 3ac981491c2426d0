"""`--model module:factory` and `--accept module:function`: the user's own code, its errors, and resumed runs."""

import sys

import numpy as np
import pytest
import torch

import ipr_fast
from ipr_fast.cli import chunks
from ipr_fast.cli.factory import is_factory
from ipr_fast.cli.main import main
from ipr_fast.files import read_samples
from ipr_fast.sampling.policies import num_chosen

MODULE = '''
import sys
import torch
import ipr_fast


class Net(torch.nn.Module):
    """A model without config, schedules, prepare or tabulate."""

    def __init__(self, bias=0.5):
        super().__init__()
        self.grid = ipr_fast.PatchGrid(1, 16, 16, 4)
        self.dropout = torch.nn.Dropout()  # refused in training mode
        self.bias = torch.nn.Parameter(torch.full((), bias))

    def forward(self, patches, levels, active=None):
        if active is not None:
            rows = torch.arange(len(patches))[:, None]
            patches = patches[rows, active.index.clamp(min=0).long()]
        return ipr_fast.Prediction(self.dropout(patches * self.bias.to(patches)))


class WithoutWeights:
    grid = ipr_fast.PatchGrid(1, 16, 16, 4)

    def __call__(self, patches, levels, active=None):
        if active is not None:
            patches = patches[torch.arange(len(patches))[:, None], active.index.clamp(min=0).long()]
        return ipr_fast.Prediction(patches * 0.5)


def make():
    return Net()


class models:
    make = staticmethod(make)


def raises():
    raise OSError("no weights\\nhere")


def leaves():
    sys.exit("bye")


def returns_a_number():
    return 3


def returns_no_grid():
    return torch.nn.Linear(1, 1)


def returns_another_grid():
    model = Net()
    model.grid = (4, 4)
    return model


def returns_the_batchs_statistics():
    model = Net()
    model.norm = torch.nn.BatchNorm1d(4, track_running_stats=False)
    return model


def takes_an_argument(path):
    return Net()


def brightness(x):
    return x.float().flatten(1).mean(1)


def absent_file(x):
    raise FileNotFoundError("no such file: scores.npy")


ready = Net()
plain = WithoutWeights()
number = 3
'''


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    """The module `mine` in the working directory, and samples that fit its models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import absent_package\n")
    np.save("x.npy", np.random.default_rng(0).uniform(-1, 1, (6, 1, 16, 16)).astype(np.float32))
    yield
    sys.modules.pop("mine", None)


def refine(model, *options, out="out.npy"):
    arguments = ["refine", "x.npy", "--model", model, "--out", out, "--iters", "3", "--schedule", "2", "0.5"]
    return main([*arguments, "--chunk", "2", "--quiet", *options])


@pytest.mark.parametrize("name", ["make", "Net", "models.make", "ready", "plain", "WithoutWeights"])
def test_factories_and_models_are_used_as_the_library_uses_them(name):
    assert refine(f"mine:{name}") == 0
    model = sys.modules["mine"].plain if "lain" in name or "Without" in name else sys.modules["mine"].make().eval()
    expected = ipr_fast.refine_batch(
        read_samples("x.npy").images, ipr_fast.random_patches(), 3, model=model, schedule=ipr_fast.Schedule(2, 0.5)
    )
    torch.testing.assert_close(read_samples("out.npy").images, expected, atol=1e-6, rtol=0)


def test_generate_takes_a_factory_and_moves_it_to_the_dtype(capsys):
    assert main(["generate", "--model", "mine:make", "--dtype", "bfloat16", "--count", "2", "--out", "g.npy"]) == 0
    assert np.load("g.npy").shape == (2, 1, 16, 16)
    assert main(["generate", "--model", "mine:ready", "--dtype", "bfloat16", "--count", "2", "--out", "h.npy"]) == 0
    assert sys.modules["mine"].ready.bias.dtype == torch.bfloat16
    capsys.readouterr()
    assert main(["generate", "--model", "mine:plain", "--dtype", "bfloat16", "--out", "g.npy", "--quiet"]) == 1
    assert "--dtype needs a model that is a torch.nn.Module, got WithoutWeights" in capsys.readouterr().err


def test_the_demo_asks_for_the_grid_of_a_task(capsys):
    assert main(["demo", "--model", "mine:make", "--quiet"]) == 1
    assert "it makes samples (1, 16, 16)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent:make", "absent:make: cannot import absent (ModuleNotFoundError: No module named 'absent')"),
        ("broken:make", "broken:make: cannot import broken (ModuleNotFoundError: No module named 'absent_package')"),
        ("mine.py:make", "mine.py:make: cannot import mine.py (ModuleNotFoundError: "),
        ("mine:absent", "mine:absent: mine has no absent"),
        ("mine:models.absent", "mine:models.absent: mine has no models.absent"),
        ("mine:number", "mine:number must be a function that returns a Denoiser, or a Denoiser, got int"),
        ("mine:raises", r"mine:raises raised OSError: no weights\nhere"),
        ("mine:leaves", "mine:leaves raised SystemExit: bye"),
        ("mine:takes_an_argument", "mine:takes_an_argument raised TypeError: takes_an_argument() missing 1 required"),
        ("mine:returns_a_number", "mine:returns_a_number must return a Denoiser, got int, which cannot be called"),
        ("mine:returns_no_grid", "must return a Denoiser, got Linear without a `grid` (ipr_fast.PatchGrid)"),
        ("mine:returns_another_grid", "mine:returns_another_grid: model must be a callable with a `grid` (PatchGrid)"),
        ("mine:returns_the_batchs_statistics", "BatchNorm1d (norm) takes the statistics of the batch"),
    ],
)
def test_what_is_no_model_is_told_in_one_line(capsys, source, message):
    assert refine(source) == 1
    error = capsys.readouterr().err
    assert error.startswith("ipr-fast refine: error: --model ")
    assert message in error
    assert error.count("\n") == 1


def test_paths_and_hub_ids_are_no_factories(tmp_path):
    for source in ("mine:make", "package.module:factory", "m:Class.build", "_a1:b_2"):
        assert is_factory(source)
    names = (
        r"C:\x.pt",
        "C:/x.pt",
        "C:x.pt",
        "C:x.safetensors",
        "owner/name",
        "owner/name/file@a:b",
        "digit-sudoku-4x4",
    )
    for source in (*names, "mine", "mine:", ":make", "mine:make:more", "a b:c", "1a:b", ""):
        assert not is_factory(source)
    (tmp_path / "mine:make").touch()
    assert not is_factory("mine:make")


@pytest.mark.parametrize("name", ["make", "plain"])
def test_an_interrupted_run_of_a_factory_is_resumed(name, monkeypatch, capsys):
    assert refine(f"mine:{name}", out="expected.npy") == 0
    real = chunks.RunFolder.save

    def save_and_stop(folder, chunk, kept):
        real(folder, chunk, kept)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chunks.RunFolder, "save", save_and_stop)
        assert refine(f"mine:{name}") == 130
    capsys.readouterr()
    assert refine("mine:Net", "--resume") == 1
    assert "a run of other settings: model" in capsys.readouterr().err
    assert refine(f"mine:{name}", "--resume") == 0
    assert np.array_equal(np.load("out.npy"), np.load("expected.npy"))


def test_a_run_is_not_resumed_with_other_weights(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    assert refine("mine:ready", out="before.npy") == 0
    with monkeypatch.context() as patch:
        patch.setattr("ipr_fast.files.write_samples", interrupted)
        assert refine("mine:ready") == 130
    sys.modules["mine"].ready.bias.fill_(0.25)
    capsys.readouterr()
    assert refine("mine:ready", "--resume") == 1
    assert "a run of other settings: model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], ipr_fast.Metropolis(lambda x: x.flatten(1).mean(1))),
        (["--accept-temperature", "0.02"], ipr_fast.Metropolis(lambda x: x.flatten(1).mean(1), 0.02)),
        (
            ["--accept-temperature", "0.02", "--keep-best"],
            ipr_fast.Metropolis(lambda x: x.flatten(1).mean(1), 0.02, keep_best=True),
        ),
    ],
    ids=["greedy", "0.02", "best"],
)
def test_samples_are_accepted_by_a_reward(options, rule, monkeypatch, capsys):
    accept = ["--accept", "mine:brightness", *options]
    assert refine("mine:make", *accept) == 0
    x, model, schedule = read_samples("x.npy").images, sys.modules["mine"].make().eval(), ipr_fast.Schedule(2, 0.5)
    expected = ipr_fast.refine_batch(x, ipr_fast.random_patches(), 3, model=model, schedule=schedule, accept=rule)
    torch.testing.assert_close(read_samples("out.npy").images, expected, atol=1e-6, rtol=0)
    accepted, proposed = int(rule.last.accepted.sum()), int(rule.last.proposed.sum())
    assert 0 < accepted < proposed
    told = f"accepted {accepted} of {proposed} proposals; the reward judged {4 * len(x)} samples; "
    calls = 3 * schedule.steps(num_chosen(0.25, model.grid.num_patches))
    assert f"{told}{calls:.1f} model calls a sample\n" in capsys.readouterr().out
    plain = ipr_fast.refine_batch(x, ipr_fast.random_patches(), 3, model=model, schedule=schedule)
    assert not torch.equal(plain, expected)

    real = chunks.refine_batch

    def stopped(x, mask_fn, iters, *, callback=None, **arguments):
        """The second chunk is interrupted in its second iteration."""

        def stop(iteration, x):
            if callback is not None:
                callback(iteration, x)
            if iteration == 2 and int(arguments["chain_ids"][0]) == 2:
                raise KeyboardInterrupt

        return real(x, mask_fn, iters, callback=stop, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "refine_batch", stopped)
        assert refine("mine:make", *accept, out="again.npy") == 130
    said = capsys.readouterr().err
    assert ("another up to iteration 2 of 3" in said) == ("--keep-best" not in options)
    assert refine("mine:make", "--accept", "mine:make", "--resume", out="again.npy") == 1
    assert "a run of other settings: accept mine:brightness (now mine:make)" in capsys.readouterr().err
    explicit = accept if options else [*accept, "--accept-temperature", "0"]  # the default is the same run
    assert refine("mine:make", *explicit, "--resume", out="again.npy") == 0
    assert "since the run was resumed: accepted" in capsys.readouterr().out
    assert np.array_equal(np.load("again.npy"), np.load("out.npy"))


def test_no_samples_are_accepted_without_a_call(capsys):
    np.save("x.npy", np.zeros((0, *np.load("x.npy").shape[1:]), np.float32))
    assert refine("mine:make", "--accept", "mine:brightness") == 0
    said = "accepted 0 of 0 proposals; the reward judged 0 samples; 0.0 model calls a sample\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accept", "brightness"], "--accept must be module:function, got 'brightness'"),
        (["--accept", "absent:f"], "--accept absent:f: cannot import absent (ModuleNotFoundError: "),
        (["--accept", "mine:absent"], "--accept mine:absent: mine has no absent"),
        (["--accept", "mine:number"], "--accept mine:number must be a function of samples (B, ...), got int"),
        (["--accept", "mine:Net"], "--accept mine:Net must be a function of samples (B, ...), got a class"),
        (
            ["--accept", "mine:raises"],
            "reward raises raised TypeError in the call before iteration 1: raises() takes 0 positional",
        ),
        (
            ["--accept", "mine:absent_file"],
            "reward absent_file raised FileNotFoundError in the call before iteration 1: no such file",
        ),
        (["--accept", "mine:brightness", "--accept-temperature", "-1"], "--accept-temperature must be a finite number"),
        (["--accept-temperature", "0"], "--accept-temperature needs --accept, the reward"),
        (["--keep-best"], "--keep-best needs --accept, the reward"),
    ],
)
def test_what_is_no_reward_is_told_in_one_line(capsys, options, message):
    assert refine("mine:make", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("ipr-fast refine: error: ")
    assert message in error
    assert error.count("\n") == 1
