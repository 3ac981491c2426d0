"""Where a model comes from: bundled, a path, or the Hugging Face hub and its cache."""

import os
import subprocess
import sys

import pytest

from ipr_fast.errors import MissingExtra
from ipr_fast.models.files import sources
from ipr_fast.models.files.checkpoints import save_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, model):
    """A hub cache that holds two files of the repository someone/boards."""
    repository = tmp_path / "hub" / "models--someone--boards"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "old").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_model(model, snapshot / "model.safetensors", note="the default")
    save_model(model, snapshot / "old" / "x.safetensors", note="another")
    return tmp_path / "hub"


def run_offline(cache, code):
    """In a process of its own, since huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_hub_ids_load_from_the_cache_offline(cache):
    code = f"""
import ipr_fast
from ipr_fast.models.files.checkpoints import model_info
old = "someone/boards/old/x.safetensors"
print([model_info(i)["metadata"]["note"] for i in ("someone/boards", "someone/boards@{COMMIT}", old, old + "@main")])
print(ipr_fast.load_model("someone/boards").grid.sample_shape)
for source in ("someone/boards/other.safetensors", "someone/else"):
    try:
        ipr_fast.load_model(source)
    except ValueError as error:
        print(error)
"""
    done = run_offline(cache, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["['the default', 'the default', 'another', 'another']", "(1, 16, 16)"]
    assert lines[2].startswith(
        "someone/boards/other.safetensors: no such file here, and no file 'other.safetensors' from"
    )
    assert "no file 'model.safetensors' from the hub repository 'someone/else' (" in lines[3]


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"models from the Hugging Face hub need huggingface_hub: .*ipr-fast\[hub\]"):
        sources.find("someone/boards")


@pytest.mark.parametrize(
    "source", ["nothing", "weights/x.ckpt", "tests/models/none", "/no/such/file", "a b/c", "", "..", "someone/boards/"]
)
def test_what_is_no_hub_id_is_never_looked_for_there(source, monkeypatch):
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(
        ValueError, match=r"source must be a bundled model .*digit-sudoku-4x4.*, an existing file or a Hug"
    ):
        sources.find(source)


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), RuntimeError("two\nlines")])
def test_whatever_the_hub_raises_is_the_documented_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"someone/boards: no such file here, and no file 'model\.safetensors' from"):
        sources.find("someone/boards")


@pytest.mark.parametrize("source", ["x" * 5000, "a/" + "b" * 5000 + ".ckpt"])
def test_names_that_no_file_can_have_are_refused(source):
    with pytest.raises(ValueError, match="source"):
        sources.find(source)


def test_a_source_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"source must be a bundled model's name, a path or a hub id, got int"):
        sources.find(3)
