"""The public calls `refine_batch` and `generate_batch`: check the arguments, run the engine, warn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ipr_fast import checks, resolve
from ipr_fast.engine.progress import Pace
from ipr_fast.kernels import philox
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling import arguments, user_code
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.sampling.policies import MaskPolicy
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.selection import FunctionSelector, MaskFn, PolicySelector, Selection, make_selector
from ipr_fast.trace import span

Callback = Callable[[int, Tensor], "Tensor | None"]

DEFAULT_REFINE_SCHEDULE = Schedule(10, 0.8)
DEFAULT_GENERATE_SCHEDULE = Schedule(3, 0.0)


def refine_batch(
    x: Tensor,
    mask_fn: MaskPolicy | MaskFn,
    iters: int = 50,
    *,
    model: Denoiser | None = None,
    known: Tensor | None = None,
    schedule: Schedule | None = None,
    stochasticity: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    chain_ids: Tensor | None = None,
    first_iteration: int = 1,
    callback: Callback | None = None,
    progress: bool = False,
    noise: str = "random",
    max_chains: int | str = "auto",
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Refine finished samples: renoise some patches of each and regenerate them given the rest, `iters` times.

    x: float images (B, C, H, W) in [-1, 1]; not modified.
    mask_fn: a policy such as `random_patches(0.25)`, or a callable `mask_fn(x, iteration)` that returns a bool mask
        (B, N) or (B, grid_h, grid_w), True = renoise. It is intersected with the free patches; a chain with nothing
        selected keeps its values for that iteration.
    iters: number of iterations, >= 0; they are `first_iteration`, `first_iteration + 1`, ...
    model: a Denoiser on the device of x; by default the bundled one whose sample shape fits x.
    known: bool (B, N) or (B, grid_h, grid_w), patches that are never renoised nor written.
    schedule: by default the model's `refine_schedule`, else Schedule(10, 0.8).
    stochasticity: eta in [0, 1]. temperature: tau in [0, 1000], a factor on the posterior noise.
    seed: int in [0, 2**64). chain_ids: int64 (B,) in [0, 2**32), default 0..B-1. A chain's random numbers depend on
        seed, chain id and iteration alone; so 25 iterations and 25 more with first_iteration=26 equal 50, up to the
        rounding of x in between.
    callback: called as callback(iteration, x) after each iteration. It may return a bool tensor (B,): chains that are
        True stay as they are for the rest of the call.
    progress: show a progress bar.
    noise: "random" renoises a patch with new noise in each iteration, "fixed" with that of `generate_batch` for the
        same seed and chain ids.
    max_chains: how many chains run at a time, >= 1; the others wait. "auto": as many as fit into free memory, on a CPU
        at most 10,000 patches, since more are slower.
    tf32: let a GPU multiply float32 in TF32. The network computes in the dtype of its weights (`load_model`).
    backend: "auto" uses CUDA graphs if x is on a GPU; "graphs" requires them, "torch" runs without; "reference" is the
        slow definition of the algorithm, one chain at a time.

    Returns images of the shape, dtype and device of x; patches that were never selected keep their bits.
    Raises ValueError for bad arguments, before any work, and on a GPU if `max_chains` chains do not fit into memory;
    CaptureError if the model cannot be captured; RuntimeError, with its cause, if mask_fn or callback raises. Warns
    (RuntimeWarning) if the model makes samples NaN or inf.
    Source: Kang, Yoon, Ahn 2026, "Inference-Time Scaling in Diffusion Models through Iterative Partial Refinement".
    """
    x = checks.images("x", x).detach()
    model = resolve.model_for(x) if model is None else model
    grid = contract.denoiser(model)
    contract.model_device(model, x.device)
    checks.images("x", x, grid.sample_shape)
    _check_range("x", x, model)
    iters = checks.integer("iters", iters, 0)
    first_iteration = checks.integer("first_iteration", first_iteration, 1)
    if schedule is None:
        schedule = getattr(model, "refine_schedule", DEFAULT_REFINE_SCHEDULE)
    if not isinstance(noise, str) or noise not in ("random", "fixed"):
        raise ValueError(f'noise must be "random" or "fixed", got {noise!r}')
    sampling = resolve.sampling(schedule, stochasticity, temperature, seed, noise == "fixed")
    arguments.counters(grid, sampling.schedule, first_iteration, iters)
    free = arguments.free_patches(known, len(x), grid, x.device)
    ids = arguments.chain_ids(chain_ids, len(x), x.device)
    backend, max_chains = resolve.backend_on(x.device, backend), resolve.chains_at_a_time(max_chains)
    call = resolve.Call(model, ids, sampling, backend, max_chains, checks.boolean("tf32", tf32))
    select = make_selector(mask_fn, grid, free, ids, sampling.seed)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be callable, got {type(callback).__name__}")
    if not len(x) or not iters:
        return x.clone()
    iterations = range(first_iteration, first_iteration + iters)
    with span("refine_batch"):
        return _with_warnings(model, *_iterate(call, select, x, iterations, callback, progress))


def generate_batch(
    batch_size: int,
    *,
    model: Denoiser | None = None,
    known: Tensor | None = None,
    known_values: Tensor | None = None,
    schedule: Schedule | None = None,
    stochasticity: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    chain_ids: Tensor | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    max_chains: int | str = "auto",
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Generate samples from noise, given the known patches; this is iteration 0 of their chains.

    batch_size: B >= 0. model: a Denoiser; by default the bundled one of 4x4 boards, on `device` or that of `known`.
    known: bool (B, N) or (B, grid_h, grid_w), True = given; known_values: float images (B, C, H, W) with the values of
        the given patches. Both or neither.
    schedule: by default the model's `generate_schedule`, else Schedule(3, 0.0).
    device: by default the model's.
    Other arguments and errors: see `refine_batch`.

    Returns float32 images (B, C, H, W); known patches hold the given values, bit for bit if those are float32.
    """
    batch_size = checks.integer("batch_size", batch_size, 0, philox.MAX_CHAIN_ID + 1)
    if (known is None) != (known_values is None):
        raise ValueError("known and known_values must be given together")
    if model is None:
        default = known.device if isinstance(known, Tensor) else "cpu"
        device = checks.usable_device("device", default if device is None else device)
        model = resolve.bundled(resolve.DEFAULT_MODEL, device)
    grid = contract.denoiser(model)
    device = resolve.device_for(device, model)
    contract.model_device(model, device)
    if schedule is None:
        schedule = getattr(model, "generate_schedule", DEFAULT_GENERATE_SCHEDULE)
    sampling = resolve.sampling(schedule, stochasticity, temperature, seed)
    arguments.counters(grid, sampling.schedule, 0, 1)
    resolve.check_memory("batch_size", batch_size, grid.num_patches * grid.patch_numel, device)
    free = arguments.free_patches(known, batch_size, grid, device)
    values = _known_values(known_values, batch_size, grid, device)
    ids = arguments.chain_ids(chain_ids, batch_size, device)
    patches = grid.to_patches(values)
    if known_values is not None and batch_size:
        in_use = patches.masked_fill(free[..., None], patches.new_zeros(()))
        _check_range("known_values", in_use, model, whole=False)
    backend, max_chains = resolve.backend_on(device, backend), resolve.chains_at_a_time(max_chains)
    call = resolve.Call(model, ids, sampling, backend, max_chains, checks.boolean("tf32", tf32))
    if not batch_size:
        return values

    selected = Selection(free.clone(), free.sum(1).cpu())
    with span("generate_batch"), call.engine(patches, max(selected.counts.tolist())) as engine:
        engine.begin(0)
        with Pace(device, engine.num_steps(selected.counts), "generate", "step", progress) as pace:
            engine.regenerate(selected, initial=True, on_step=pace.step if progress else None)
        x = grid.to_images(torch.where(free[..., None], engine.values, patches))
        return _with_warnings(model, x, engine.mix_range)


def _known_values(known_values: Tensor | None, batch_size: int, grid: PatchGrid, device: torch.device) -> Tensor:
    """Return the known values as float32 images (B, C, H, W), zeros if there are none."""
    if known_values is None:
        return torch.zeros(batch_size, *grid.sample_shape, dtype=torch.float32, device=device)
    checks.images("known_values", known_values, grid.sample_shape)
    checks.same_device("known_values", known_values, device)
    if len(known_values) != batch_size:
        raise ValueError(f"known_values must have batch_size {batch_size} samples, got {len(known_values)}")
    checks.extremes("known_values", known_values)
    return known_values.detach().float()


def _iterate(
    call: resolve.Call,
    select: PolicySelector | FunctionSelector,
    x: Tensor,
    iterations: range,
    callback: Callback | None,
    progress: bool,
) -> tuple[Tensor, Tensor | None]:
    """Refine x. Returns the samples and the range (2,) of the first call's variance mix."""
    grid = call.model.grid
    original = grid.to_patches(x)
    touched = torch.zeros_like(select.free)
    bar = Pace(x.device, len(iterations), "refine", "iteration", progress, decimals=1)
    with call.engine(original, select.most_active) as engine, bar as pace:

        def samples() -> Tensor:
            return grid.to_images(torch.where(touched[..., None], engine.values.to(x.dtype), original))

        for iteration in iterations:
            with span("iteration"):
                engine.begin(iteration)
                selected = select(iteration, engine.iteration, samples)
                if selected.varies:  # a Python mask_fn was called
                    engine.notice_changes()
                steps = engine.num_steps(selected.counts) if progress else 0
                engine.regenerate(selected, on_step=partial(pace.step, 1 / steps) if steps else None)
                touched |= selected.mask
            if not steps:
                pace.step()
            if callback is not None:
                frozen = _call_back(callback, iteration, samples())
                if frozen is not None and select.freeze(frozen):
                    break
                engine.notice_changes()
        select.verify()
        return samples(), engine.mix_range


def _call_back(callback: Callback, iteration: int, x: Tensor) -> Tensor | None:
    name = f"callback {checks.name_of(callback)}"
    with span("callback"):
        frozen = user_code.call(name, iteration, callback, iteration, x)
    if frozen is None:
        return None
    if not isinstance(frozen, Tensor) or frozen.dtype != torch.bool or tuple(frozen.shape) != (len(x),):
        came = checks.described(frozen)
        raise ValueError(f"{name} must return None or a bool tensor of shape ({len(x)},), got {came}")
    return frozen


def _with_warnings(model: Denoiser, x: Tensor, mix_range: Tensor | None) -> Tensor:
    """Return x; warn the caller of the public function if the model's variance mix or x itself is out of range."""
    for complaint in (contract.mix_complaint(model, mix_range), _not_finite(x)):
        if complaint is not None:
            warnings.warn(complaint, RuntimeWarning, 3)
    return x


def _not_finite(x: Tensor) -> str | None:
    bad = checks.count_not_finite(x) if len(x) else 0
    return f"{bad} of {len(x)} samples have NaN or inf, from the model's predictions" if bad else None


def _check_range(name: str, x: Tensor, model: Denoiser, *, whole: bool = True) -> None:
    """Check that x is finite; warn the caller of the public function if its range is not the model's."""
    complaint = contract.range_complaint(name, checks.extremes(name, x), model, whole=whole)
    if complaint is not None:
        warnings.warn(complaint, contract.RangeWarning, 3)
