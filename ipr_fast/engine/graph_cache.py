"""Which lanes a call runs on: how many fit into the memory, and those kept from earlier calls with their graphs.

A capture takes about as long as a few dozen ticks, so lanes with graphs are kept: a few, for later calls of similar
size with the same model and settings. They are dropped when their model goes away or changes, when others have been
used more recently, when their memory is needed, and after any exception.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ipr_fast.engine import memory
from ipr_fast.engine.fingerprint import Fingerprint, fingerprint
from ipr_fast.engine.graphs import Capture
from ipr_fast.engine.lanes import Lanes, Settings, Start
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.scheduler import Run, Wave, lane_bucket
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.schedule import Schedule

MOST_KEPT = 4
KEPT_SHARE = 0.1  # of a GPU's memory, for all lanes that are kept
MOST_LANES = 1 << 15  # attention takes a dimension of the launch for its chains, and that ends at 65,535
CPU_PATCHES = 10_000  # that "auto" takes at a time on a CPU: more are slower, and take more memory (bench/lanes.py)
FEW_CHAINS = 64  # that are not counted on a CPU: counting calls the model on four chains

_kept: OrderedDict[Hashable, Kept] = OrderedDict()
_watched: dict[int, weakref.finalize] = {}  # models whose end is noticed
_lock = threading.RLock()  # a model's end may come while it is held


@dataclass(frozen=True)
class Kept:
    """Lanes between two calls, without their model, of which there is the fingerprint.

    most_active: the patches a chain that their memory was counted for; size: the bytes that it came to.
    """

    lanes: Lanes
    model: Fingerprint
    most_active: int
    size: int


@contextmanager
def lanes_for(
    model: Denoiser,
    batch: int,
    most_active: int,
    device: torch.device,
    settings: Settings,
    *,
    max_chains: int | str = "auto",
    capture: Callable[[torch.device], Capture] | None = None,
) -> Iterator[Lanes]:
    """Lanes for chains with at most `most_active` active patches each, of which `batch` are to come.

    max_chains: how many may run at a time; "auto" is what the free memory holds, on a CPU at most CPU_PATCHES patches.
    capture: makes what captures graphs on a device; without, the lanes run without graphs. Raises ValueError when they
    do not fit into the memory.
    """
    fit = partial(_fitting, model, batch, most_active, device, settings, max_chains, capture is not None)
    wanted = min(batch if capture is None else lane_bucket(batch), _most_lanes(max_chains, device, model))
    lanes = kept = None
    try:
        if capture is None:
            yield Lanes(model, fit(wanted)[0], device, settings)
            return
        key = (id(model), wanted, max_chains == "auto", device, settings, _circumstances(device))
        seen = fingerprint(model)
        with _lock:
            kept = _kept.pop(key, None)
        if kept is None or kept.most_active < most_active or not kept.model.equals(seen):
            kept = None  # its memory is free now
            number, size = fit(wanted)
            kept = Kept(Lanes(model, number, device, settings, capture(device)), seen, most_active, size)
        lanes = kept.lanes
        lanes.model, lanes.seen = model, seen
        yield lanes
    except torch.OutOfMemoryError as error:
        kept = None
        drop_kept()
        raise torch.OutOfMemoryError(_out_of_memory(wanted if lanes is None else lanes.lanes, device)) from error
    kept = replace(kept, model=lanes.seen)
    lanes.model = lanes.seen = None  # it must be able to go away
    if isinstance(model, nn.Module):  # anything else may change in ways that nobody can see
        _keep(key, kept, model)


def _most_lanes(max_chains: int | str, device: torch.device, model: Denoiser) -> int:
    if max_chains != "auto":
        return min(MOST_LANES, max_chains)
    return max(1, CPU_PATCHES // model.grid.num_patches) if device.type == "cpu" else MOST_LANES


def _out_of_memory(lanes: int, device: torch.device) -> str:
    told = f"out of memory on {device} with {lanes} chains at a time"
    return f"{told}; pass max_chains={lanes // 2} or fewer" if lanes > 1 else f"{told}: not even one fits"


def _keep(key: Hashable, kept: Kept, model: nn.Module) -> None:
    with _lock:
        if id(model) not in _watched:
            _watched[id(model)] = weakref.finalize(model, _drop, id(model))
            _watched[id(model)].atexit = False
        _kept[key] = kept
        most = KEPT_SHARE * memory.total_bytes(kept.lanes.device)
        while _kept and (len(_kept) > MOST_KEPT or sum(each.size for each in list(_kept.values())) > most):
            _kept.popitem(last=False)


def drop_kept() -> None:
    """Give back the memory of the graphs and buffers that are kept for later calls."""
    with _lock:
        _kept.clear()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _fitting(
    model: Denoiser,
    batch: int,
    most_active: int,
    device: torch.device,
    settings: Settings,
    max_chains: int | str,
    graphs: bool,
    wanted: int,
) -> tuple[int, int]:
    """The lanes to make, those wanted or, if that is left open, as many as fit; and their bytes.

    Raises ValueError where they do not fit.
    """
    if device.type == "cpu" and (max_chains != "auto" or batch <= FEW_CHAINS):
        return wanted, 0
    with float32_products(device, settings.tf32):  # before the lock that counting takes, as everywhere
        need = need_of(model, most_active, device, settings, graphs)
    around = 4 * 4 * batch * model.grid.num_patches * model.grid.patch_numel  # the samples themselves, and copies

    def usable() -> float:
        return memory.SHARE * memory.available_bytes(device) - around

    if need.lanes_within(usable()) < wanted and _kept:
        drop_kept()
    fits = need.lanes_within(usable())
    if max_chains == "auto" and 0 < fits < wanted:
        wanted = batch if batch <= fits else 1 << fits.bit_length() - 1
    if wanted <= fits:
        return wanted, need.of(wanted)
    size, there = memory.binary(need.of(wanted)), memory.binary(max(0.0, usable()))
    advice = f'pass max_chains={fits} or "auto"' if fits else "not even one fits"
    raise ValueError(f"max_chains: {wanted} chains at a time need {size} on {device}, which has {there} left; {advice}")


def need_of(
    model: Denoiser, most_active: int, device: torch.device, settings: Settings, graphs: bool = False
) -> memory.Need:
    """The bytes that lanes for chains of so many active patches take."""
    return memory.count(partial(_make, model, device, settings), partial(_run, most_active), device, graphs)


def _make(model: Denoiser, device: torch.device, settings: Settings, number: int) -> Lanes:
    """So many lanes."""
    lanes = Lanes(model, number, device, settings)
    lanes.set_sampling(0, Schedule(1))
    return lanes


@torch.inference_mode()
def _run(most_active: int, lanes: Lanes) -> None:
    """A step of all lanes."""
    lanes.state.mask[:, :most_active] = True
    wave = Wave(slice(0, lanes.lanes), most_active, (Run(lanes.lanes, 1),))
    lanes.run(wave, max(1, most_active), Start(chooses=False, initial=True))


def _drop(model: int) -> None:
    with _lock:
        _watched.pop(model, None)
        for key in [key for key in list(_kept) if key[0] == model]:
            _kept.pop(key, None)


def _circumstances(device: torch.device) -> tuple:
    """The switches of torch that decide which operations are captured."""
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
    )
