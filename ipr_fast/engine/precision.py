"""Switches TF32, with ten bits of mantissa, on or off for float32 products on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch


class _Shared:
    """Process-wide state: the setting, how to restore the previous one, its threads (one entry per nested block)."""

    changed = threading.Condition()
    users: ClassVar[list[int]] = []
    tf32 = False
    restore: ClassVar[list[Callable[[], None]]] = []


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Use TF32 for float32 matrix products and convolutions on a GPU, or do not; restore torch's switches afterwards.

    By default, torch uses TF32 for convolutions only. The switches are the whole process's: threads that want the same
    setting share it, a thread that wants the other one waits. Raises RuntimeError if one thread nests both.
    """
    if device.type != "cuda":
        yield
        return
    thread = threading.get_ident()
    with _Shared.changed:
        if thread in _Shared.users and _Shared.tf32 != tf32:
            raise RuntimeError(f"tf32={tf32} within work that runs with tf32={not tf32}, in one thread")
        _Shared.changed.wait_for(lambda: not _Shared.users or _Shared.tf32 == tf32)
        if not _Shared.users:
            _Shared.tf32, _Shared.restore = tf32, _switch(tf32)
        _Shared.users.append(thread)
    try:
        yield
    finally:
        with _Shared.changed:
            _Shared.users.remove(thread)
            if not _Shared.users:
                for call in _Shared.restore:
                    call()
                _Shared.changed.notify_all()


def _switch(tf32: bool) -> list[Callable[[], None]]:
    """Set torch's switches; return calls that restore them."""
    try:
        products = partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        restore: list[Callable[[], None]] = [products, _restoring(torch.backends.cudnn, "allow_tf32")]
    except RuntimeError:  # the program has set torch's newer switches; the older ones cannot be read then
        backends = ((torch.backends.cuda, "matmul"), (torch.backends.cudnn, "conv"))
        newer = [getattr(backend, name) for backend, name in backends]
        restore = [_restoring(switch, "fp32_precision") for switch in newer]
        for switch in newer:
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        return restore
    on_cpu = getattr(torch.backends.mkldnn, "matmul", None)  # in newer versions, changed by the next line too
    restore += [_restoring(on_cpu, "fp32_precision")] if on_cpu is not None else []
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    return restore


def _restoring(owner: object, name: str) -> Callable[[], None]:
    return partial(setattr, owner, name, getattr(owner, name))
