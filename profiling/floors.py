"""Lower bounds of a tick's time from its FLOPs and bytes: for profiling/roofline.py.

Ideal floor: all FLOPs at the peak rate, or the least bytes at full bandwidth, whichever takes longer. Floor as
launched: the sum over operators of the same bound, with all bytes that each reads and writes.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from support.chains import Step
from support.counts import Counts, Operation, count
from support.launches import is_packed, size_of, tensors_of
from support.subjects import num_active
from torch import Tensor

from ipr_fast import Denoiser


class Roof(NamedTuple):
    """Peak FLOP/s and bytes/s of a device."""

    peak: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        return max(flops / self.peak, moved / self.bandwidth)

    def memory_bound(self, flops: float, moved: float) -> bool:
        return moved / self.bandwidth > flops / self.peak


# NVIDIA's data sheet of the H200 SXM: float32 without tensor cores, bfloat16 with them and without sparsity.
MACHINES = {"h200": {"float32": Roof(67e12, 4.8e12), "bfloat16": Roof(989e12, 4.8e12)}}


class Work(NamedTuple):
    """The work of a tick; least_bytes: that any implementation must move."""

    operations: list[Operation]
    flops: int
    bytes: int
    least_bytes: int


@torch.inference_mode()
def work_of_tick(model: Denoiser, batch: int, kernels: bool) -> Work:
    """Count a tick of a meta model, with a quarter of the patches active, as Triton kernels or twins."""
    step = Step.begun(model, batch, num_active(model), model.refine_schedule, "meta", kernels=kernels)
    tick = count(step.tick, "meta", kernels=kernels)
    return Work(tick.operations, tick.flops, tick.bytes, least_bytes(step, tick))


def least_bytes(step: Step, tick: Counts) -> int:
    """Return the bytes, each once, of what a tick reads and writes.

    These are weights, tables and context as far as the tick reads them, patches, and predictions.
    """
    lanes, (chains, patches, numel) = step.lanes, step.lanes.state.values.shape
    prepared = lanes.precomputed.arguments(chains, lanes.state.first(chains))
    given = [*lanes.model.parameters(), *tensors_of(prepared), *_laid_out(prepared.get("table"))]
    kept = [each for each in given if is_packed(each) or each.untyped_storage()._cdata in tick.given]
    read = step.slots if "context" in prepared else patches  # with a context, only active patches
    state = 4 * chains * (read + step.slots) * numel
    return state + size_of([*kept, *tensors_of(lanes.predict(chains, step.slots))])


def _laid_out(table: object) -> list[Tensor]:
    """Return the weights that a GPU reads in place of the layers' own."""
    packed = getattr(table, "packed", None)
    return [] if packed is None else packed.on_gpu


class Floors(NamedTuple):
    """Both floors in seconds, and what bounds them."""

    ideal: float
    ideal_bound: str  # bound by "memory" or "compute"
    as_launched: float
    memory_bound: float  # share of the floor as launched in memory-bound operators
    most: str  # the top operator, with the largest share of the floor as launched
    most_share: float


def floors(work: Work, roof: Roof) -> Floors:
    """Return the floors of a tick on a device."""
    by_name: Counter[str] = Counter()
    memory_bound = 0.0
    for name, flops, moved in work.operations:
        by_name[name] += roof.seconds(flops, moved)
        memory_bound += roof.seconds(flops, moved) if roof.memory_bound(flops, moved) else 0.0
    launched, (most, longest) = by_name.total(), by_name.most_common(1)[0]
    bound = "memory" if roof.memory_bound(work.flops, work.least_bytes) else "compute"
    ideal = roof.seconds(work.flops, work.least_bytes)
    return Floors(ideal, bound, launched, memory_bound / launched, most, longest / launched)
