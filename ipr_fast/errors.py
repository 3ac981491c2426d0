"""Import of optional dependencies, with errors that say what to install."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional dependency that is needed is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} need {package}: pip install 'ipr-fast[{extra}]' (or pip install {package})")


class BrokenExtra(ImportError):
    """An optional dependency that is needed is installed, but cannot be imported."""

    def __init__(self, package: str, purpose: str, reason: Exception) -> None:
        first_line = str(reason).strip().partition("\n")[0]
        super().__init__(
            f"{purpose} need {package}, which is installed but broken ({type(reason).__name__}: {first_line})"
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
