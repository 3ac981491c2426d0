"""The package as it is installed: from a wheel, editable, and imported in a clone without either."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import ipr_fast, ipr_fast.kernels.philox as p; print(p.__file__, ipr_fast.bundled_models())"


def run(*command, cwd, **environment):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "./tree")
    run(*command, cwd=folder)
    return next(folder.glob("ipr_fast-*.whl"))


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not this project."""
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    installed = Path(next(p for p in sys.path if (Path(p) / "torch").is_dir()))
    (site / "outside.pth").write_text(
        f"{installed}\n"
    )  # its own .pth files, editable installs among them, are not read
    return folder / "bin" / "python"


def test_the_wheel_holds_kernels_weights_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ipr_fast", "ipr_fast-0.1.0.dist-info"}
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert f"ipr_fast/kernels/{kernel.name}" in names
    for module in (ROOT / "ipr_fast").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    assert "ipr_fast/models/weights/digit-sudoku-4x4.safetensors" in names
    assert "ipr_fast/models/weights/digit-sudoku-4x4.md" in names


def test_an_installed_wheel_imports_and_runs(wheel, tmp_path):
    python = fresh_environment(tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    out = run(python, "-c", IMPORT, cwd=tmp_path)
    assert str(site) in out
    assert "digit-sudoku-4x4" in out
    assert "digit-sudoku-4x4" in run(python, "-m", "ipr_fast", "info", cwd=tmp_path)


def test_an_editable_install_imports(tmp_path):
    python = fresh_environment(tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site)
    run(*command, "-e", ROOT, cwd=tmp_path)
    assert str(ROOT / "kernels" / "philox.py") in run(python, "-c", IMPORT, cwd=tmp_path)


def test_a_clone_imports_without_an_install(tmp_path):
    python = fresh_environment(tmp_path / "env")
    assert str(ROOT / "kernels" / "philox.py") in run(python, "-c", IMPORT, cwd=ROOT)


def test_nothing_of_the_extras_is_imported_with_the_package():
    code = "import ipr_fast, ipr_fast.cli.main, sys; print(sorted({'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)))"
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
