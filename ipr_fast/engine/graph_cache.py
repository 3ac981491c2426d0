"""Sizes the lanes to free memory, and keeps them with their captured graphs for later calls.

A capture takes about as long as a few dozen ticks, so a later call with the same model, settings and a batch up to the
same power of two takes the lanes of an earlier one. Kept lanes are dropped when their model changes or is deleted, when
newer ones take their place, when their memory is needed, and after any exception.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ipr_fast.engine import memory
from ipr_fast.engine.capture_stream import capture_lock
from ipr_fast.engine.fingerprint import fingerprint
from ipr_fast.engine.graphs import Capture
from ipr_fast.engine.lanes import Lanes, LaneSettings
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.runner import Runner
from ipr_fast.engine.scheduler import Phase, Wave, lane_bucket
from ipr_fast.sampling.condition import Condition

MOST_KEPT = 4
KEPT_SHARE = 0.1  # of a GPU's memory, for all lanes that are kept
MOST_LANES = 1 << 15  # a launch of attention has a dimension of lanes, which ends at 65,535
CPU_PATCHES = 10_000  # "auto" on a CPU: with more at a time it is slower and takes more memory (bench/lanes.py)
FEW_CHAINS = 64  # on a CPU, bytes are counted for more chains only: it costs model calls on four chains

Key = tuple[int, Hashable]  # id of the model, and the settings that kept lanes must match


@dataclass(frozen=True)
class Kept:
    """Lanes between two calls, without their model.

    most_active: active patches per chain for which `num_bytes` was counted.
    """

    runner: Runner
    most_active: int
    num_bytes: int
    model: weakref.ref[nn.Module] | None = None  # drops this when the model is deleted


_kept: OrderedDict[Key, Kept] = OrderedDict()
_lock = threading.RLock()  # reentrant: a model may be deleted while its thread holds it


@dataclass(frozen=True)
class Request:
    """A call's need of lanes: `batch` chains with at most `most_active` active patches each.

    max_chains: chains that run at a time; "auto" is what fits into free memory, on a CPU at most CPU_PATCHES patches.
    capture: makes the Capture of a device; None runs without graphs. condition: the chains', whose first row lanes hold
    that no chain has entered: the model is called on those too, to count bytes and to capture.
    """

    model: Any
    batch: int
    most_active: int
    device: torch.device
    settings: LaneSettings
    max_chains: int | str = "auto"
    capture: Callable[[torch.device], Capture] | None = None
    condition: Condition | None = None

    @property
    def wanted(self) -> int:
        """The number of lanes, if they fit into memory."""
        batch = self.batch if self.capture is None else lane_bucket(self.batch)
        if isinstance(self.max_chains, int):
            return min(batch, MOST_LANES, self.max_chains)
        on_cpu = max(1, CPU_PATCHES // self.settings.sample_shape(self.model)[0])
        return min(batch, on_cpu if self.device.type == "cpu" else MOST_LANES)

    @property
    def key(self) -> Key:
        auto = self.max_chains == "auto"
        return id(self.model), (self.wanted, auto, self.device, self.settings, _torch_switches(self.device))

    def allocate(self) -> Kept:
        """Allocate the lanes. Raises ValueError if they do not fit; "auto" takes fewer then."""
        num_lanes, num_bytes = self.wanted, 0
        if self.device.type != "cpu" or (self.max_chains == "auto" and self.batch > FEW_CHAINS):
            with float32_products(self.device, self.settings.tf32):  # lock order: before without_compile
                need = need_of(
                    self.model,
                    self.most_active,
                    self.device,
                    self.settings,
                    self.capture is not None,
                    num_lanes,
                    self.condition,
                )
            num_lanes = self._fitting(need)
            num_bytes = need.of(num_lanes)
        capture = None if self.capture is None else self.capture(self.device)
        lanes = _lanes(self.model, num_lanes, self.device, self.settings, self.condition)
        return Kept(Runner(lanes, capture), self.most_active, num_bytes)

    def _fitting(self, need: memory.Need) -> int:
        """Return the number of lanes that fit beside the samples and copies of them; drop kept lanes if necessary."""
        wanted, device = self.wanted, self.device
        num_patches, patch_bytes = self.settings.sample_shape(self.model)
        samples = 4 * self.batch * num_patches * patch_bytes

        def usable() -> float:
            return memory.SHARE * memory.available_bytes(device) - samples

        if need.lanes_within(usable()) < wanted and _kept:
            drop_kept()
        fits = need.lanes_within(usable())
        if self.max_chains == "auto" and 0 < fits < wanted:
            wanted = self.batch if self.batch <= fits else 1 << fits.bit_length() - 1
        if wanted <= fits:
            return wanted
        needed, available = memory.binary(need.of(wanted)), memory.binary(max(0.0, usable()))
        advice = f'pass max_chains={fits} or "auto"' if fits else "not even one fits"
        raise ValueError(
            f"max_chains: {wanted} chains at a time need {needed} on {device}, which has {available} left; {advice}"
        )


@contextmanager
def runner_for(request: Request) -> Iterator[Runner]:
    """Provide lanes for a call: kept ones that fit, else new ones. Raises ValueError if they do not fit into memory."""
    kept = None
    try:
        if request.capture is None:
            kept = request.allocate()
            yield kept.runner
            return
        key, state = request.key, fingerprint(request.model)
        with _lock:
            kept = _kept.pop(key, None)
        if kept is not None:
            same = kept.runner.fingerprint is not None and kept.runner.fingerprint.equals(state)
            if not same or kept.most_active < request.most_active:
                kept = None  # frees its memory
        kept = kept or request.allocate()
        kept.runner.lanes.model, kept.runner.fingerprint = request.model, state
        yield kept.runner
    except torch.OutOfMemoryError as error:
        num_lanes = request.wanted if kept is None else kept.runner.lanes.num_lanes
        kept = None
        drop_kept()
        advice = f"; pass max_chains={num_lanes // 2} or fewer" if num_lanes > 1 else ": not even one fits"
        raise torch.OutOfMemoryError(
            f"out of memory on {request.device} with {num_lanes} chains at a time{advice}"
        ) from error
    del kept.runner.lanes.model  # kept lanes must not keep the model alive
    if isinstance(request.model, nn.Module):  # other callables may change unnoticed
        _keep(key, kept, request.model)


def _keep(key: Key, kept: Kept, model: nn.Module) -> None:
    with _lock:
        _kept[key] = replace(kept, model=weakref.ref(model, lambda _: _drop(key)))
        most = KEPT_SHARE * memory.total_bytes(kept.runner.lanes.device)
        while _kept and (len(_kept) > MOST_KEPT or sum(each.num_bytes for each in list(_kept.values())) > most):
            _kept.popitem(last=False)


def _drop(key: Key) -> None:
    with _lock:
        _kept.pop(key, None)


def drop_kept() -> None:
    """Free the memory of the graphs and buffers that are kept for later calls."""
    with _lock:
        _kept.clear()
    if torch.cuda.is_available():
        with capture_lock:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def need_of(
    model: Any,
    most_active: int,
    device: torch.device,
    settings: LaneSettings,
    graphs: bool = False,
    most: int = memory.MANY,
    condition: Condition | None = None,
) -> memory.Need:
    """Count the bytes of lanes for chains with `most_active` active patches. most: lanes that are wanted."""
    make = partial(_make, model, device, settings, condition=condition)
    return memory.count(make, partial(_run, most_active), device, graphs, most)


def _make(
    model: Any, device: torch.device, settings: LaneSettings, num_lanes: int, condition: Condition | None = None
) -> Runner:
    runner = Runner(_lanes(model, num_lanes, device, settings, condition))
    runner.start_call(0, settings.schedule)
    return runner


def _lanes(
    model: Any, num_lanes: int, device: torch.device, settings: LaneSettings, condition: Condition | None
) -> Lanes:
    """Allocate lanes that hold the condition's first row, for calls of the model before chains enter."""
    lanes = settings.make_lanes(model, num_lanes, device)
    if condition is not None and lanes.state.condition is not None:
        condition.first(1).spread(lanes.state.condition)
    return lanes


@torch.inference_mode()
def _run(most_active: int, runner: Runner) -> None:
    """Run one step of all lanes."""
    lanes = runner.lanes
    lanes.state.mask[:, :most_active] = True
    wave = Wave(slice(0, lanes.num_lanes), most_active, (Phase(lanes.num_lanes, 1),))
    runner.run(runner.segments(wave, max(1, most_active), chooses=False, initial=True))


def _torch_switches(device: torch.device) -> Hashable:
    """Return the switches of torch that decide which operations are captured."""
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
    )
