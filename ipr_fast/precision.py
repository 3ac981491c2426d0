"""How a GPU multiplies float32: exactly, or in TF32 with ten bits of mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Within, matrix products and convolutions of float32 on a GPU use TF32, or do not; afterwards all is as before.

    By default torch takes TF32 for convolutions and not for matrix products.
    """
    if device.type != "cuda":
        yield
        return
    write, before = _settings()
    write(("high", True) if tf32 else ("highest", False))
    try:
        yield
    finally:
        write(before)


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
