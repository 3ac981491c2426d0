"""The public calls `refine_batch` and `generate_batch`: check the arguments, run the engine, warn."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

from ipr_fast import checks, resolve
from ipr_fast.callbacks import Callback, call_back, check_callback, generate_by_steps
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.progress import Pace
from ipr_fast.kernels import philox
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling import arguments, user_code
from ipr_fast.sampling.acceptance import Acceptor, Metropolis, check_rule
from ipr_fast.sampling.condition import Conditioning
from ipr_fast.sampling.condition import checked as checked_condition
from ipr_fast.sampling.guidance.generation import Guidance, check_guidance
from ipr_fast.sampling.policies import MaskPolicy
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.selection import FunctionSelector, MaskFn, PolicySelector, Selection, make_selector
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.spaces import Space, space_of
from ipr_fast.trace import span


def refine_batch(
    x: Tensor,
    mask_fn: MaskPolicy | MaskFn,
    iters: int = 50,
    *,
    model: Denoiser | TokenDenoiser | None = None,
    known: Tensor | None = None,
    schedule: Schedule | TokenSchedule | None = None,
    stochasticity: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    chain_ids: Tensor | None = None,
    first_iteration: int = 1,
    condition: Conditioning | None = None,
    accept: Metropolis | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    noise: str = "random",
    max_chains: int | str = "auto",
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Refine finished samples: renoise some patches of each and regenerate them given the rest, `iters` times.

    x: float samples (B, *sample_shape) of the model's grid, such as images (B, C, H, W) in [-1, 1], or int64 tokens
        (B, N) for a model of tokens; not modified.
    mask_fn: a policy such as `random_patches(0.25)`, or a callable `mask_fn(x, iteration)` that returns a bool mask
        (B, N) or (B, *grid_shape), True = renoise. It is intersected with the free patches; a chain with nothing
        selected keeps its values for that iteration. A `mask_fn(x, iteration, *, signals)` gets `ipr_fast.Signals` too:
        the model's uncertainty of each patch or token when it was last regenerated.
    iters: number of iterations, >= 0; they are `first_iteration`, `first_iteration + 1`, ...
    model: a Denoiser or TokenDenoiser on the device of x; by default the bundled one whose sample shape fits x.
    known: bool (B, N) or (B, *grid_shape), patches that are never renoised nor written.
    schedule: by default the model's `refine_schedule`, else Schedule(10, 0.8); for tokens TokenSchedule().
    stochasticity: eta in [0, 1]. temperature: tau in [0, 1000], a factor on the posterior noise.
    seed: int in [0, 2**64). chain_ids: int64 (B,) in [0, 2**32), default 0..B-1. A chain's random numbers depend on
        seed, chain id and iteration alone; so 25 iterations and 25 more with first_iteration=26 equal 50, up to the
        rounding of x in between.
    condition: a tensor, or a dict or tuple of tensors, each with B rows: labels, embeddings, masks. A model's calls get
        it as `condition=` in this form, with the rows of the chains that they hold.
    accept: Metropolis(reward, temperature): an iteration's samples are proposals, which a chain accepts or not by their
        reward; a chain that does not keeps its sample, bit for bit.
    callback: called as callback(iteration, x) after each iteration. It may return a bool tensor (B,): chains that are
        True stay as they are for the rest of the call.
    progress: show a progress bar.
    noise: "random" renoises a patch with new noise in each iteration, "fixed" with that of `generate_batch` for the
        same seed and chain ids.
    max_chains: how many chains run at a time, >= 1; the others wait. "auto": as many as fit into free memory, on a CPU
        at most 10,000 patches, since more are slower. It may call the model with a few rows first, to count memory.
    tf32: let a GPU multiply float32 in TF32. The network computes in the dtype of its weights (`load_model`).
    backend: "auto" uses CUDA graphs if x is on a GPU; "graphs" requires them, "torch" runs without; "reference" is the
        slow definition of the algorithm, one chain at a time.

    Tokens have no `stochasticity`, `temperature` (but for the schedule's) and `noise`.
    Returns samples of the shape, dtype and device of x; patches that were never selected keep their bits.
    Raises ValueError for bad arguments, before any work, and on a GPU if `max_chains` chains do not fit into memory;
    CaptureError if the model cannot be captured; RuntimeError, with its cause, if mask_fn, callback or reward raises.
    Warns (NotFiniteWarning, a RuntimeWarning) if the model makes samples NaN or inf, or leaves tokens masked.
    Source: Kang, Yoon, Ahn 2026, "Inference-Time Scaling in Diffusion Models through Iterative Partial Refinement".
    """
    if model is None:
        model = resolve.model_for(x)
    space = space_of(model)
    x = space.check("x", x).detach()
    contract.model_device(model, x.device)
    _warn(space.complaint("x", x), contract.RangeWarning)
    iters = checks.integer("iters", iters, 0)
    first_iteration = checks.integer("first_iteration", first_iteration, 1)
    sampling = space.sampling(schedule, "refine_schedule", stochasticity, temperature, seed, noise)
    arguments.counters(space.grid, sampling, first_iteration, iters)
    resolve.check_tables(sampling, space.grid.num_patches)
    free = arguments.free_patches(known, len(x), space.grid, x.device)
    ids = arguments.chain_ids(chain_ids, len(x), x.device)
    backend, max_chains = resolve.backend_on(x.device, backend), resolve.chains_at_a_time(max_chains)
    rows = checked_condition(condition, len(x), x.device)
    contract.condition(model, rows is not None)
    call = resolve.Call(space, ids, sampling, backend, max_chains, checks.boolean("tf32", tf32), rows)
    checks.boolean("progress", progress)
    select = make_selector(mask_fn, space.grid, free, ids, sampling.seed)
    check_callback(callback)
    check_rule(accept)
    if not len(x) or not iters:
        return x.clone()
    iterations = range(first_iteration, first_iteration + iters)
    with span("refine_batch"):
        return _with_warnings(space, *_iterate(call, select, x, iterations, accept, callback, progress))


def generate_batch(
    batch_size: int,
    *,
    model: Denoiser | TokenDenoiser | None = None,
    known: Tensor | None = None,
    known_values: Tensor | None = None,
    schedule: Schedule | TokenSchedule | None = None,
    stochasticity: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    chain_ids: Tensor | None = None,
    condition: Conditioning | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    max_chains: int | str = "auto",
    tf32: bool = False,
    backend: str = "auto",
    guidance: Guidance | None = None,
) -> Tensor:
    """Generate samples from noise, given the known patches; this is iteration 0 of their chains.

    batch_size: B >= 0. model: a Denoiser; by default the bundled one of 4x4 boards, on `device` or that of `known`.
    known: bool (B, N) or (B, *grid_shape), True = given; known_values: float samples (B,
        *sample_shape), or int64 tokens (B, N), with the values of the given patches. Both or neither.
    schedule: by default the model's `generate_schedule`, else Schedule(3, 0.0); for tokens TokenSchedule().
    callback: called as callback(step, x) after each step 0..T-1 of the chains, with all samples as they stand: noise in
        patches that wait, the mask in tokens that are hidden. It may return a bool tensor (B,): chains that are True
        stay as they are. Each chain has taken the step, or was finished or frozen before, whatever `max_chains` is; so
        with a callback each step takes a pass over the context too. Without one nothing changes.
    device: by default the model's.
    guidance: generate toward a reward: `IterRef(reward, ...)` or another of `ipr_fast.sampling.guidance`, whose `last`
        then holds the calls of the model and the reward. A schedule of tokens must reveal by "count" without remasking.
    Other arguments and errors: see `refine_batch`.

    Returns float32 samples (B, *sample_shape), or int64 tokens (B, N); known patches hold the given values, bit for
    bit if those are float32 or tokens.
    """
    batch_size = checks.integer("batch_size", batch_size, 0, philox.MAX_CHAIN_ID + 1)
    if (known is None) != (known_values is None):
        raise ValueError("known and known_values must be given together")
    if model is None:
        default = known.device if isinstance(known, Tensor) else "cpu"
        device = checks.usable_device("device", default if device is None else device)
        model = resolve.bundled(resolve.DEFAULT_MODEL, device)
    space = space_of(model)
    device = resolve.device_for(device, model)
    contract.model_device(model, device)
    sampling = space.sampling(schedule, "generate_schedule", stochasticity, temperature, seed, "random")
    arguments.counters(space.grid, sampling, 0, 1)
    resolve.check_tables(sampling, space.grid.num_patches)
    check_callback(callback)
    if guidance is not None:
        check_guidance(guidance, sampling.schedule)
        if callback is not None:
            raise ValueError("callback must be None with a guidance, whose generation goes back and forth")
    resolve.check_memory("batch_size", batch_size, space.sample_bytes, device)
    if guidance is not None:
        name = f"guidance, {guidance.width} rows a chain"
        resolve.check_memory(name, batch_size * guidance.width, space.sample_bytes, device)
    free = arguments.free_patches(known, batch_size, space.grid, device)
    given = _known_values(known_values, batch_size, space, device)
    ids = arguments.chain_ids(chain_ids, batch_size, device)
    if known_values is not None and batch_size:
        _warn(space.complaint("known_values", given, ignored=free), contract.RangeWarning)
    backend, max_chains = resolve.backend_on(device, backend), resolve.chains_at_a_time(max_chains)
    rows = checked_condition(condition, batch_size, device)
    contract.condition(model, rows is not None)
    call = resolve.Call(space, ids, sampling, backend, max_chains, checks.boolean("tf32", tf32), rows)
    checks.boolean("progress", progress)
    if not batch_size:
        return given
    values = space.own_values(given, None if known_values is None else free)
    if guidance is not None:
        return _with_warnings(space, *_guided(call, guidance, values, free, progress))
    selected = Selection(free.clone(), free.sum(1).cpu())
    with span("generate_batch"), call.engine(values, max(selected.counts.tolist())) as engine:
        engine.begin(0)
        with Pace(device, engine.num_steps(selected.counts), "generate", "step", progress) as pace:
            finished = None
            if callback is None:
                engine.regenerate(selected, initial=True, on_step=pace.step if progress else None)
            else:
                finished = _generate_with(callback, call, engine, selected, values, pace)
        return _with_warnings(space, space.to_samples(engine.values, values, free), engine.mix_range, finished)


def _generate_with(
    callback: Callback,
    call: resolve.Call,
    engine: Engine | ReferenceEngine,
    selected: Selection,
    values: Tensor,
    pace: Pace,
) -> Tensor:
    """Generate samples step by step, and call a callback after each one. Returns which of them (B,) it let finish."""
    totals = torch.tensor([call.sampling.num_steps(n) for n in selected.counts.tolist()], device="cpu")

    def after(step: int) -> Tensor | None:
        frozen = call_back(callback, step, call.space.to_samples(engine.values, values, selected.mask), "step")
        user_code.check_eval_mode(call.space.model)
        return frozen

    longest = max(totals.tolist())
    share = engine.num_steps(selected.counts) / longest if longest else 0.0  # of the bar, for a step of all chains
    return generate_by_steps(engine, selected, totals, after, lambda part: pace.step(share * part))


def _guided(
    call: resolve.Call, guidance: Guidance, values: Tensor, free: Tensor, progress: bool
) -> tuple[Tensor, Tensor | None]:
    """Generate samples by a guidance. Returns them and the range (2,) of the first call's variance mix."""
    steps = max(call.sampling.num_steps(n) for n in set(free.sum(1).tolist()))
    bar = Pace(values.device, guidance.stages(steps), "generate", "stage", progress, decimals=1)
    with span("generate_batch"), bar as pace, call.generation(guidance, values, free, pace.step) as generation:
        x = guidance.generate(generation)
        shape, dtype = (len(values), *call.space.sample_shape), call.space.dtype
        if not isinstance(x, Tensor) or tuple(x.shape) != shape or x.dtype != dtype:
            name = f"guidance: {type(guidance).__name__}.generate"
            raise ValueError(f"{name} must return samples {shape} of {dtype}, got {checks.described(x)}")
        user_code.check_eval_mode(call.space.model)
        return x, generation.engine.mix_range


def _known_values(known_values: Tensor | None, batch_size: int, space: Space, device: torch.device) -> Tensor:
    """Return the known values as samples in the engine's type, zeros if there are none."""
    if known_values is None:
        return torch.zeros(batch_size, *space.sample_shape, dtype=space.dtype, device=device)
    known_values = space.check("known_values", known_values)
    checks.same_device("known_values", known_values, device)
    if len(known_values) != batch_size:
        raise ValueError(f"known_values must have batch_size {batch_size} samples, got {len(known_values)}")
    return known_values.detach().to(space.dtype)


def _iterate(
    call: resolve.Call,
    select: PolicySelector | FunctionSelector,
    x: Tensor,
    iterations: range,
    accept: Metropolis | None,
    callback: Callback | None,
    progress: bool,
) -> tuple[Tensor, Tensor | None]:
    """Refine x. Returns the samples and the range (2,) of the first call's variance mix."""
    original = call.space.own_values(x)
    touched = torch.zeros_like(select.free)
    bar = Pace(x.device, len(iterations), "refine", "iteration", progress, decimals=1)
    with call.engine(original, select.most_active, select.takes_signals) as engine, bar as pace:

        def samples() -> Tensor:
            return call.space.to_samples(engine.values, original, touched)

        def notice_changes() -> None:
            """Check the model again after user code ran, which may have changed it."""
            user_code.check_eval_mode(call.space.model)
            engine.notice_changes()

        acceptor = None
        if accept is not None:
            acceptor = Acceptor(accept, engine.values, samples(), call.chain_ids, call.sampling.seed, iterations[0])
            mode = user_code.EvalMode(call.space.model)
        for iteration in iterations:
            with span("iteration"):
                engine.begin(iteration)
                selected = select(iteration, engine.iteration, samples, engine.signals)
                if selected.varies:  # user code was called
                    notice_changes()
                steps = engine.num_steps(selected.counts) if progress else 0
                before = None if engine.signals is None or acceptor is None else engine.signals.clone()
                engine.regenerate(selected, on_step=partial(pace.step, 1 / steps) if steps else None)
                if acceptor is None:
                    touched |= selected.mask
                else:
                    with span("acceptance"):
                        proposals = call.space.to_samples(engine.values, original, touched | selected.mask)
                        acceptor.decide(engine.values, proposals, iteration, engine.iteration, selected.mask, touched)
                        mode.check()
                        if before is not None and engine.signals is not None:
                            engine.signals = engine.signals.where(acceptor.accepted, before)
            if not steps:
                pace.step()
            if callback is not None:
                frozen = call_back(callback, iteration, samples())
                if frozen is not None and select.freeze(frozen):
                    break
                notice_changes()
        select.verify()
        values, changed = (engine.values, touched) if acceptor is None else acceptor.finish(engine.values, touched)
        return call.space.to_samples(values, original, changed), engine.mix_range


def _with_warnings(space: Space, x: Tensor, mix_range: Tensor | None, finished: Tensor | None = None) -> Tensor:
    """Return x; warn the caller of the public function if the model's variance mix or x itself is out of range.

    finished: which samples (B,) to look at, the others still have noise or masks; None for all.
    """
    _warn(contract.mix_complaint(space.model, mix_range), RuntimeWarning, 4)
    made = x if finished is None else x[finished.to(x.device)]
    _warn(space.bad_samples(made), contract.NotFiniteWarning, 4)
    return x


def _warn(complaint: str | None, category: type[Warning], level: int = 3) -> None:
    """Warn the caller of the public function, if there is a complaint."""
    if complaint is not None:
        warnings.warn(complaint, category, level)
