"""Every function of the package and its kernels has complete annotations, Triton kernels apart. Read with `ast`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ipr_fast", "kernels")
KERNEL_DECORATORS = ("jit", "triton.jit")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def incomplete(source: str) -> list[str]:
    """The functions of a module that lack an annotation, as "line: name"; but for Triton kernels and their helpers."""
    tree = ast.parse(source)
    methods = {id(node) for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for node in cls.body}
    return [
        f"{node.lineno}: {node.name}"
        for node in ast.walk(tree)
        if isinstance(node, Function) and not is_kernel(node) and lacks(node, id(node) in methods)
    ]


def is_kernel(function: Function) -> bool:
    return any(ast.unparse(decorator) in KERNEL_DECORATORS for decorator in function.decorator_list)


def lacks(function: Function, is_method: bool) -> bool:
    return function.returns is None or any(argument.annotation is None for argument in arguments(function, is_method))


def arguments(function: Function, is_method: bool) -> Iterator[ast.arg]:
    """All arguments but `self` and `cls`."""
    positional = [*function.args.posonlyargs, *function.args.args]
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    yield from positional[1:] if is_method and not is_static else positional
    yield from function.args.kwonlyargs
    yield from (argument for argument in (function.args.vararg, function.args.kwarg) if argument is not None)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_function_is_annotated(folder):
    found = [
        f"{path.relative_to(ROOT)}:{each}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for each in incomplete(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        "def f(x): ...",
        "def f(x: int): ...",
        "def f(x) -> int: ...",
        "def f(*, x) -> int: ...",
        "def f(*x) -> int: ...",
        "def f(**x) -> int: ...",
        "async def f(x) -> int: ...",
        "class C:\n    def f(self, x) -> int: ...",
        "class C:\n    @staticmethod\n    def f(x) -> int: ...",
        "class C:\n    def f(self): ...",
        "def g() -> None:\n    def f(x) -> int: ...",
        "@cache\ndef f(x): ...",
    ],
)
def test_an_incomplete_annotation_is_found(planted):
    (found,) = incomplete(planted)
    assert found.endswith(": f")


@pytest.mark.parametrize(
    "complete",
    [
        "def f(x: int, *y: int, z: int = 0, **more: int) -> None: ...",
        "class C:\n    def f(self, x: int) -> int: ...",
        "class C:\n    @classmethod\n    def f(cls) -> int: ...",
        "@jit\ndef kernel(p_x, N, BLOCK: tl.constexpr): ...",
        "@triton.jit\ndef kernel(p_x): ...",
        "f = lambda x: x",
    ],
)
def test_complete_annotations_and_kernels_are_not(complete):
    assert incomplete(complete) == []
