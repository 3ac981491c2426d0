"""Detects files that are left open until garbage collection."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unclosed(monkeypatch) -> Iterator[list[str]]:
    """Provide a list that holds, after the block, a warning for each file that the block opened and left open."""
    found = []
    gc.collect()  # what others have left
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "unraisablehook", lambda caught: found.append(str(caught.exc_value)))
        warnings.simplefilter("error", ResourceWarning)
        yield found
        gc.collect()
