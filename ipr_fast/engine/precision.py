"""How a GPU multiplies float32: exactly, or in TF32 with ten bits of mantissa."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    if getattr(_own, "tf32", tf32) != tf32:
        raise RuntimeError(f"tf32={tf32} within work that runs with tf32={not tf32}, in one thread")
    with _Within.changed:
        _Within.changed.wait_for(lambda: _Within.number == 0 or _Within.tf32 == tf32)
        if _Within.number == 0:
            _Within.tf32, _Within.restore = tf32, _switch(tf32)
        _Within.number += 1
    _own.depth, _own.tf32 = getattr(_own, "depth", 0) + 1, tf32


def _leave() -> None:
    _own.depth -= 1
    if not _own.depth:
        del _own.tf32
    with _Within.changed:
        _Within.number -= 1
        if _Within.number == 0:
            _Within.restore()
            _Within.changed.notify_all()


_own = threading.local()  # how deep this thread is within, and with what


def _switch(tf32: bool) -> Callable[[], None]:
    """Set torch's switches; returns what puts them back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    on_cpu = getattr(torch.backends.mkldnn, "matmul", None)  # of newer versions
    on_cpu_before = getattr(on_cpu, "fp32_precision", None)
    try:
        products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the program has set torch's newer switches, which the older ones then refuse to read
        newer = (matmul, cudnn.conv)
        before = [switch.fp32_precision for switch in newer]
        for switch in newer:
            switch.fp32_precision = "tf32" if tf32 else "ieee"

        def restore() -> None:
            for switch, value in zip(newer, before, strict=True):
                switch.fp32_precision = value

        return restore
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32 = tf32

    def restore() -> None:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        if on_cpu is not None:  # which the first line has switched as well
            on_cpu.fp32_precision = on_cpu_before

    return restore
