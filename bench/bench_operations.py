"""The operations of kernels/: Triton kernels on a GPU, torch twins on a CPU, as the engine runs them.

A kernel is first checked against its twin, a twin against its definition in float64. Memory-bound operations are
measured in bytes that must move, against a copy of as many; linear layers and attention in FLOPs, against a matrix
product and torch's layer, or its attention of all tokens.

A timed work is many calls, on a GPU as one graph, that rotate over buffers larger than its caches (up to 64 of them:
those of `advance` fit). Buffers written in place are restored before each work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from support import network_operations, operations, token_operations
from support.chains import Replayed
from support.harness import seconds
from support.measure import Arm, Check, Measure
from support.operations import BOARDS, Inputs, Operation
from torch import Tensor

pytestmark = pytest.mark.benchmark(group="operations")
SMOKE_BATCH, FULL_BATCH = 2, 4096
CACHE = 256 * 2**20  # bytes; more than the second-level cache of any GPU
MOST_BUFFERS, MOST_CALLS, CALLS_ON_GPU = 64, 1024, 16
LEAST = 0.002  # seconds of a timed work on a CPU, at least
NEEDS = 3.0  # seconds of a benchmark, about
# Tolerance in roundings of the largest value. Of results in bfloat16: of weights and of results, on both sides.
ROUNDINGS, ROUNDINGS_BFLOAT16 = 32, 4


class Case(NamedTuple):
    """An operation at a shape, from `make(batch, device, seed)`; small: its chains at small sizes.

    on_gpu: alone: in bfloat16, or where the CPU's layers are packed instead.
    """

    operation: str
    shape: str
    make: Callable[[int, torch.device, int], Operation]
    small: int
    unit: str = "bytes"
    on_gpu: bool = False

    def __str__(self) -> str:
        return f"{self.operation}, {self.shape}" + (", on a GPU" if self.on_gpu else "")


def cases() -> list[Case]:
    """Return all operations at the shapes of the bundled transformer, a 9x9 one and the UNet of Even Pixels."""
    of_step = {
        "renoise": operations.renoise_chosen,
        "slot inputs": operations.gather_slots,
        "normals": operations.renoise_all,
        "advance": operations.advance_half_way,
        "denoise": operations.denoise_all,
        "accept": operations.accept_half,
    }
    found = [
        Case(name, shape, partial(make, board), small)
        for name, make in of_step.items()
        for (shape, board), small in zip(BOARDS.items(), (256, 16, 64), strict=True)
    ]
    for shape, small in (((4, 96), 256), ((20, 256), 64)):
        name = "{} tokens, {} wide".format(*shape)
        found.append(Case("layer norm", name, partial(network_operations.layer_norm, shape), small))
        found.append(Case("gated norm", name, partial(network_operations.gated_norm, shape), small))
        found.append(Case("embedded norm", name, partial(network_operations.embedded_norm, shape), small))
    for operation, make, hidden in (
        ("pixel features", network_operations.encode_pixels, 32),
        ("pixel head", network_operations.read_pixels, 16),
    ):
        shape = (16, 3, 16, hidden)
        name = "{} patches of {} x {}, {} units".format(*shape)
        found.append(Case(operation, name, partial(make, shape), 64))
    for shape in ((64, 64, 8), (64, 32, 8), (128, 16, 8), (256, 4, 4)):
        name = "{0} x {1} x {1}".format(*shape)
        found.append(Case("group norm", name, partial(network_operations.group_norm_silu, shape), 8))
        found.append(Case("map sum", name, partial(network_operations.map_sum_of, shape[:2]), 8))
    for vocabulary, small in ((10, 1024), (50_258, 16), (126_464, 4)):
        name = f"{vocabulary:,} ids"
        found.append(Case("categorical", name, partial(token_operations.draw_tokens, vocabulary), small))
        found.append(Case("threshold", name, partial(token_operations.find_threshold, vocabulary), small))
    for length, small in ((16, 256), (81, 64), (1024, 4)):
        found.append(Case("mask", f"{length} positions", partial(token_operations.mask_chosen, length), small))
        found.append(Case("reveal", f"{length} positions", partial(token_operations.reveal_half_way, length), small))
    for shape, gelu, small in (((4, 96, 384), True, 256), ((20, 256, 768), False, 16), ((20, 256, 1024), True, 16)):
        name = "{} tokens, {} to {}".format(*shape) + (", GELU" if gelu else "")
        found.append(Case("linear", name, partial(network_operations.linear_layer, shape, gelu), small, "flop", True))
    for dtype in (torch.float32, torch.bfloat16):
        half = dtype == torch.bfloat16
        for shape, small in (((4, 16, 6, 16), 256), ((20, 81, 4, 64), 16), ((64, 256, 4, 64), 4)):
            name = "{} of {} tokens, {} heads of {}".format(*shape)
            make = partial(network_operations.attention, shape, dtype)
            found.append(Case("partial attention", name, make, small, "flop", half))
        for shape, small in (((16, 6, 16), 64), ((81, 4, 64), 4)):
            name = "{} tokens, {} heads of {}".format(*shape)
            make = partial(network_operations.context_attention, shape, dtype)
            found.append(Case("context attention", name, make, small, "flop", half))
    return found


def in_turn(calls: Sequence[Callable[[], object]], number: int, device: torch.device) -> Replayed:
    """Return `number` calls, in turn, as one work; on a GPU, as a graph."""

    def work() -> None:
        for i in range(number):
            calls[i % len(calls)]()

    return Replayed("calls of an operation", work, device)


def calls_in_a_work(call: Callable[[], object], device: torch.device) -> int:
    """Return how many calls make the overhead of a work, above all its synchronisation, small."""
    if device.type == "cuda":
        return CALLS_ON_GPU
    call()
    return min(MOST_CALLS, math.ceil(LEAST / seconds(call, device)))


def buffers_for(first: Operation, device: torch.device) -> int:
    """Return over how many sets of buffers to rotate."""
    if device.type == "cuda":
        return min(MOST_BUFFERS, math.ceil(CACHE / first.bytes))
    first.reset()
    return min(MOST_BUFFERS, calls_in_a_work(first.run, device))


def check(operation: Operation, device: torch.device) -> Check:
    """Check `run` against the twin on a GPU, else against the definition; return the check of the worst tensor."""
    operation.reset()
    found = [tensor.clone() for tensor in operation.run()]
    operation.reset()
    against, expected = ("twin", operation.twin) if device.type == "cuda" else ("definition", operation.definition)
    pairs = zip(found, expected(), strict=True)
    checks = [Check(against, *_apart(ours, theirs)) for ours, theirs in pairs]
    return max(checks, key=lambda each: each.difference / max(each.tolerance, 1e-30))


def _apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference, infinite if undefined, and its tolerance: 0 for integers."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = (found.double() - expected.double()).abs().max().nan_to_num(nan=torch.inf).item()
    if not found.is_floating_point():
        return difference, 0.0
    unit = torch.finfo(found.dtype).eps / 2
    roundings = ROUNDINGS_BFLOAT16 if found.dtype == torch.bfloat16 else ROUNDINGS
    return difference, roundings * unit * max(1.0, expected.double().abs().max().item())


def copy_arm(size: int, buffers: int, device: torch.device) -> Arm:
    """Return copies that move `size` bytes each, half read and half written, rotating over `buffers` buffers."""
    pairs = [torch.zeros(2, max(1, size // 8), device=device) for _ in range(buffers)]
    calls = [partial(pair[0].copy_, pair[1]) for pair in pairs]
    number = max(buffers, calls_in_a_work(calls[0], device))
    return Arm(in_turn(calls, number, device), number * pairs[0].nbytes)


def product_arm(dtype: torch.dtype, device: torch.device) -> Arm:
    """Return a matrix product large enough to keep the device busy."""
    size = 8192 if device.type == "cuda" else 512
    a, b = Inputs(device, 0).normals(2, size, size, dtype=dtype)
    number = calls_in_a_work(lambda: a @ b, device)
    return Arm(in_turn([lambda: a @ b], number, device), number * 2 * size**3)


def yardsticks(sets: Sequence[Operation], ours: Arm, calls: int, device: torch.device) -> dict[str, Arm]:
    """Return the yardsticks of an operation."""
    first = sets[0]
    if first.plain is None:
        return {"copy": copy_arm(first.bytes, len(sets), device)}
    plain = in_turn([each.plain for each in sets], calls, device)
    return {"matrix product": product_arm(first.dtype, device), "torch": Arm(plain, ours.units)}


@pytest.mark.parametrize("case", cases(), ids=str)
@torch.inference_mode()
def test_operation(case: Case, measure: Measure, device: torch.device, sizes: str) -> None:
    if case.on_gpu and device.type == "cpu":
        pytest.skip("is measured on a GPU alone")
    measure.may_take(NEEDS)
    batch = {"smoke": SMOKE_BATCH, "small": case.small, "full": FULL_BATCH}[sizes]
    first = case.make(batch, device, 0)
    sets = [first, *(case.make(batch, device, seed) for seed in range(1, buffers_for(first, device)))]
    calls = max(len(sets), CALLS_ON_GPU if device.type == "cuda" else 1)

    def reset() -> None:
        for each in sets:
            each.reset()

    units = calls * (first.flops if case.unit == "flop" else first.bytes)
    ours = Arm(in_turn([each.run for each in sets], calls, device), units, reset)
    measure(
        lambda: check(first, device),
        ours,
        yardsticks(sets, ours, calls, device),
        unit=case.unit,
        budget=1.0,
        needs=NEEDS,
        subject=case.operation,
        shape=case.shape,
        batch=batch,
        dtype=str(first.dtype).removeprefix("torch."),
        bytes=first.bytes,
        flops=first.flops,
        calls=calls,
    )
