"""Imports run down the list of folders, and modules import each other in no circle. Read with `ast`, nothing is run."""

import ast
import graphlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (  # from the top; `ipr_fast` is the package's own __init__.py
    "profiling",
    "bench",
    "cli",
    "evaluation",
    "training",
    "tasks",
    "ipr_fast",
    "refine",
    "resolve",
    "callbacks",
    "model_check",
    "golden",
    "spaces",
    "engine",
    "models",
    "sampling",
    "leaves",
    "kernels",
)
LEAVES = ("checks", "errors", "files", "outputs", "pictures", "trace")
IMPORTED_AS = {"ipr_fast": "ipr_fast.", "kernels": "ipr_fast.kernels.", "bench": "", "profiling": ""}


def modules(root: Path) -> dict[str, Path]:
    """The files of all folders by the names that they are imported under."""
    found = {}
    for folder, prefix in IMPORTED_AS.items():
        for path in sorted((root / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(root / folder).with_suffix("").parts)
            name = name.removesuffix("__init__").removesuffix(".")
            assert name not in found, f"{path} and {found[name]} have the same name"
            found[name] = path
    return found


def layer(root: Path, path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    first, *rest = path.relative_to(root).parts
    if first != "ipr_fast" or len(rest) > 1:
        return first if first != "ipr_fast" else rest[0]
    if path.stem in LEAVES:
        return "leaves"
    return {"__init__": "ipr_fast", "__main__": "cli"}.get(path.stem, path.stem)


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {module for name in names if (module := _module_of(name, known))}


def _module_of(name: str, known: dict[str, Path]) -> str | None:
    """The module that a dotted name is, or is in; None for one of others."""
    while name not in known:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def upward(root: Path) -> list[str]:
    """The imports that run up."""
    known = modules(root)
    place = {name: ORDER.index(layer(root, path)) for name, path in known.items()}
    return [
        f"{path.relative_to(root)} ({ORDER[place[name]]}) imports {other} ({ORDER[place[other]]})"
        for name, path in known.items()
        for other in sorted(imports(path, known))
        if place[other] < place[name]
    ]


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle, if there are any."""
    known = modules(root)
    try:
        graphlib.TopologicalSorter({name: imports(path, known) for name, path in known.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources, to be changed."""
    for folder in IMPORTED_AS:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "weights")
        )
    return tmp_path


def test_imports_run_down():
    assert upward(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(ROOT) == []


def test_one_module_imports_ray():
    names = 'import_extra("ray"', "import ray", "from ray"
    files = (ROOT / "ipr_fast").rglob("*.py")
    found = [path for path in files if any(name in path.read_text() for name in names)]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["ipr_fast/evaluation/scale/cluster.py"]


def test_every_folder_is_read():
    found = {layer(ROOT, path) for path in modules(ROOT).values()}
    assert found == set(ORDER)


@pytest.mark.parametrize(
    ("file", "planted", "named"),
    [
        ("ipr_fast/sampling/flow.py", "from ipr_fast.engine import lanes", "ipr_fast.engine.lanes (engine)"),
        ("ipr_fast/sampling/flow.py", "from ipr_fast.models.denoiser import Denoiser", "ipr_fast.models.denoiser"),
        ("ipr_fast/checks.py", "def f():\n    import ipr_fast.sampling.patches", "ipr_fast.sampling.patches"),
        ("ipr_fast/errors.py", "if TYPE_CHECKING:\n    from ipr_fast.refine import refine_batch", "ipr_fast.refine"),
        ("ipr_fast/refine.py", "from ipr_fast import random_patches", "imports ipr_fast (ipr_fast)"),
        ("ipr_fast/tasks/base.py", "from ipr_fast.training import configs", "ipr_fast.training.configs (training)"),
        ("ipr_fast/models/files/sources.py", "import ipr_fast.cli.main as m", "ipr_fast.cli.main (cli)"),
        ("ipr_fast/engine/lanes.py", "from support import subjects", "support.subjects (bench)"),
        ("kernels/philox.py", "from ipr_fast import errors", "ipr_fast.errors (leaves)"),
        ("bench/support/counts.py", "import floors", "floors (profiling)"),
    ],
)
def test_an_import_that_runs_up_is_found(tree, file, planted, named):
    path = tree / file
    path.write_text(f"{path.read_text()}\n{planted}\n")
    (found,) = upward(tree)
    assert found.startswith(file)
    assert named in found


def test_a_circle_is_found(tree):
    path = tree / "ipr_fast" / "models" / "unet.py"
    path.write_text(f"{path.read_text()}\nif TYPE_CHECKING:\n    from ipr_fast.models.srm_unet import SRMUNet\n")
    assert set(circle(tree)) == {"ipr_fast.models.unet", "ipr_fast.models.srm_unet"}
    assert upward(tree) == []


def test_a_module_outside_the_list_is_found(tree):
    (tree / "ipr_fast" / "misplaced.py").touch()
    with pytest.raises(ValueError, match="not in tuple"):
        upward(tree)
