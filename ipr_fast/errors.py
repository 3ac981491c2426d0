"""Errors of optional dependencies, which say what to install, and of user code; the first line of an error."""

import importlib
import re
from types import ModuleType


class ExtraError(ImportError):
    """An optional dependency that is needed cannot be imported."""


class MissingExtra(ExtraError):
    """An optional dependency that is needed is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} need {package}: pip install 'ipr-fast[{extra}]' (or pip install {package})")


class BrokenExtra(ExtraError):
    """An optional dependency that is needed is installed, but cannot be imported."""

    def __init__(self, package: str, purpose: str, reason: Exception) -> None:
        super().__init__(
            f"{purpose} need {package}, which is installed but broken ({type(reason).__name__}: {first_line(reason)})"
        )


class UserCodeError(RuntimeError):
    """A function of the user's raised an exception, which is the cause."""


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_reason(error: BaseException) -> str:
    """Return why a file cannot be loaded, in a line, without torch's advice to run the code in it."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else first_line(error)
