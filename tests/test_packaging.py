"""The package as it is installed: from a wheel, an sdist, editable, and imported in a clone without any."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import ipr_fast, ipr_fast.kernels.philox as p; print(p.__file__, ipr_fast.bundled_models())"
CODE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ipr_fast").rglob("*.py"))
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
MODELS = "counting-polygons-small", "digit-sudoku-4x4", "digit-sudoku-9x9", "even-pixels", "token-sudoku-9x9"
WEIGHTS = [f"ipr_fast/models/weights/{name}.{kind}" for name in MODELS for kind in ("safetensors", "md")]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ipr_fast").rglob("recipes/*.toml"))
EXPERIMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ipr_fast").rglob("experiments/*.toml"))
DATA = ["ipr_fast/py.typed", "ipr_fast/tasks/polygons/reader.safetensors", *WEIGHTS, *RECIPES, *EXPERIMENTS]
IMPORTS_ALL = """
import importlib, importlib.resources, importlib.util, sys
for name in sys.argv[1:]:
    if name.endswith(".py"):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module != "ipr_fast.__main__":
            importlib.import_module(module)
    else:
        assert (importlib.resources.files("ipr_fast") / name.removeprefix("ipr_fast/")).is_file(), name
top = importlib.util.find_spec("kernels")  # may be Hugging Face's
print(importlib.import_module("ipr_fast").__file__, None if top is None else top.origin)
"""


def run(*command, cwd, **environment):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imports_all(python: Path, cwd: Path) -> str:
    """Import every module in an environment, and find the data there; returns where from."""
    kernels = [f"ipr_fast/kernels/{name}" for name in KERNELS]
    return run(python, "-I", "-c", IMPORTS_ALL, *CODE, *kernels, *DATA, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of this tree: a build leaves folders behind."""
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("package") / "tree"
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    """The source distribution of this tree."""
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=tree)
    return next(tree.parent.glob("ipr_fast-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """The wheel, built from the source distribution: so both are whole."""
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", ".", sdist)
    run(*command, cwd=sdist.parent)
    return next(sdist.parent.glob("ipr_fast-*.whl"))


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not this project."""
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    installed = Path(next(p for p in sys.path if (Path(p) / "torch").is_dir()))
    (site / "outside.pth").write_text(
        f"{installed}\n"
    )  # its own .pth files, editable installs among them, are not read
    return folder / "bin" / "python"


def test_the_wheel_holds_all_code_and_data_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ipr_fast", "ipr_fast-0.1.0.dist-info"}
    kernels = [f"ipr_fast/kernels/{name}" for name in KERNELS]
    assert sorted(name for name in names if name.startswith("ipr_fast/")) == sorted([*CODE, *kernels, *DATA])


def test_the_sdist_holds_all_code_and_data(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*CODE, *DATA, *(f"kernels/{name}" for name in KERNELS), "README.md", "LICENSE"} <= names


def test_an_installed_wheel_imports_and_runs(wheel, tmp_path):
    python = fresh_environment(tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    where = imports_all(python, tmp_path)
    assert where.startswith(str(site))
    assert "ipr_fast" not in where.split()[1]
    assert "digit-sudoku-4x4" in run(python, "-I", "-m", "ipr_fast", "info", cwd=tmp_path)
    assert "digit-sudoku-4x4" in run(site / "bin" / "ipr-fast", "info", cwd=tmp_path, PYTHONPATH=str(site))


def test_an_editable_install_imports(tmp_path):
    python = fresh_environment(tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site)
    run(*command, "-e", ROOT, cwd=tmp_path)
    assert str(ROOT / "kernels" / "philox.py") in run(python, "-I", "-c", IMPORT, cwd=tmp_path)
    file, top = imports_all(python, tmp_path).split()
    assert file == str(ROOT / "ipr_fast" / "__init__.py")
    assert not top.startswith(str(ROOT))


def test_a_clone_imports_without_an_install(tmp_path):
    python = fresh_environment(tmp_path / "env")
    assert str(ROOT / "kernels" / "philox.py") in run(python, "-c", IMPORT, cwd=ROOT)


def test_nothing_of_the_extras_is_imported_with_the_package():
    extras = {"sklearn", "matplotlib", "PIL", "pyarrow", "ray"}
    code = f"import ipr_fast, ipr_fast.cli.main, sys; print(sorted({extras} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_without_triton_it_runs_on_the_twins():
    code = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None
import ipr_fast
x = ipr_fast.generate_batch(2)
print(ipr_fast.refine_batch(x, ipr_fast.random_patches(), 1).shape)
"""
    assert "[2, 1, 32, 32]" in run(sys.executable, "-c", code, cwd=ROOT)
