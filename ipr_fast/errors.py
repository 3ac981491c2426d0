"""Errors that tell the user what to do."""


class MissingExtra(ImportError):
    """A part of the package was used whose optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} need {package}: pip install 'ipr-fast[{extra}]' (or pip install {package})")
