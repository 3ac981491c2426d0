"""How a GPU multiplies float32: exactly, or in TF32 with ten bits of mantissa."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Within, matrix products and convolutions of float32 on a GPU use TF32, or do not; afterwards all is as before.

    By default torch takes TF32 for convolutions and not for matrix products. These are switches of the whole process:
    threads that want the same are within together, one that wants the other waits until they are out.
    """
    if device.type != "cuda":
        yield
        return
    _enter(tf32)
    try:
        yield
    finally:
        _leave()


class _Within:
    """How many are within, with what, and how to restore what was before."""

    changed = threading.Condition()
    number, tf32 = 0, False
    restore: Callable[[], None]


def _enter(tf32: bool) -> None:
    with _Within.changed:
        _Within.changed.wait_for(lambda: _Within.number == 0 or _Within.tf32 == tf32)
        if _Within.number == 0:
            write, before = _settings()
            write(("high", True) if tf32 else ("highest", False))
            _Within.tf32, _Within.restore = tf32, partial(write, before)
        _Within.number += 1


def _leave() -> None:
    with _Within.changed:
        _Within.number -= 1
        if _Within.number == 0:
            _Within.restore()
            _Within.changed.notify_all()


def _settings():
    """A function that sets (precision of products, whether convolutions take TF32), and its present arguments."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the program has set torch's newer switches, which the older ones then refuse to read
        before = matmul.fp32_precision, cudnn.conv.fp32_precision

        def write(values: tuple) -> None:
            names = {"high": "tf32", "highest": "ieee", True: "tf32", False: "ieee"}
            matmul.fp32_precision, cudnn.conv.fp32_precision = (names.get(value, value) for value in values)
    else:

        def write(values: tuple) -> None:
            torch.set_float32_matmul_precision(values[0])
            cudnn.allow_tf32 = values[1]

    return write, before
