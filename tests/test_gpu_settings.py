"""The settings of the GPU tests are valid: all are built here, on any machine, where the tests themselves are skipped.

Those at module level are built by the import. An expression in a function is evaluated with the names of its module, so
one that depends on the function's own variables fails here too: its settings belong at module level.
"""

import ast
import importlib
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import test_gpu_training

from ipr_fast.tasks.catalog import TASKS

FILES = sorted(path.stem for path in Path(__file__).parent.glob("test_gpu*.py") if path.stem != Path(__file__).stem)
BUILT_BELOW = {"small_task"}


def is_settings(value: object) -> bool:
    """Whether a call of this makes settings: a dataclass or NamedTuple without tensors, or a copy of one."""
    fields = value.__annotations__ if isinstance(value, type) and "__annotations__" in vars(value) else {}
    is_record = is_dataclass(value) or hasattr(value, "_fields")
    return value is replace or (is_record and not any("Tensor" in str(kind) for kind in fields.values()))


def settings_in(name: str) -> dict[str, ast.expr]:
    """The calls that make settings in functions of a module, by place."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in BUILT_BELOW]
    return {
        f"{name}.py:{node.lineno} {ast.unparse(node)}": node
        for function in functions
        for node in ast.walk(ast.Module(function.body, []))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and is_settings(getattr(module, node.func.id, None))
    }


@pytest.mark.parametrize("name", FILES)
def test_the_settings_in_a_gpu_test_can_be_built(name):
    names = vars(importlib.import_module(name))
    for place, call in settings_in(name).items():
        try:
            eval(compile(ast.Expression(call), place, "eval"), names)
        except Exception as error:
            pytest.fail(f"{place}: {type(error).__name__}: {error}")


def test_there_are_some():
    assert len(settings_in("test_gpu_graphs")) > 10


def test_the_tasks_of_the_training_tests_can_be_built():
    for name in TASKS:
        assert test_gpu_training.small_task(name).config.width == 64
