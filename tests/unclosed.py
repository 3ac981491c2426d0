"""Files that are left for the garbage collector to close."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unclosed(monkeypatch) -> Iterator[list[str]]:
    """A list that holds a warning for each file that the block has opened and not closed, once the block has ended."""
    found = []
    gc.collect()  # what others have left
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "unraisablehook", lambda caught: found.append(str(caught.exc_value)))
        warnings.simplefilter("error", ResourceWarning)
        yield found
        gc.collect()
