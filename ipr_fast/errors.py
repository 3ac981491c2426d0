"""Errors that tell the user what to do, and the import of optional dependencies."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A part of the package was used whose optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} need {package}: pip install 'ipr-fast[{extra}]' (or pip install {package})")


class BrokenExtra(ImportError):
    """A part of the package was used whose optional dependency is installed, but cannot be imported."""

    def __init__(self, package: str, purpose: str, reason: Exception) -> None:
        line = next((line for line in str(reason).splitlines() if line.strip()), "")
        super().__init__(
            f"{purpose} need {package}, which is installed but broken ({type(reason).__name__}: {line.strip()})"
        )


def import_extra(module: str, package: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises MissingExtra when the dependency is not installed, BrokenExtra when importing it fails in any other way.
    """
    root = module.partition(".")[0]
    try:
        importlib.import_module(root)
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == root:
            raise MissingExtra(package, extra, purpose) from error
        raise BrokenExtra(package, purpose, error) from error
