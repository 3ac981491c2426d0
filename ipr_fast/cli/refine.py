"""`ipr-fast refine`: refine samples that a model has made, in chunks that can be resumed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ipr_fast import checks, files
from ipr_fast.cli.chunks import ChunkPlan, RefineArguments, Tally, refine_in_chunks, run_folder
from ipr_fast.cli.common import (
    ACCEPTANCE,
    FILES,
    REFINEMENT,
    DtypeOption,
    RunOptions,
    flag,
    load,
    model_from,
    model_option,
    one_of,
    option,
    path,
    path_option,
    tell,
    write,
)
from ipr_fast.cli.factory import reward_from
from ipr_fast.cli.sampling_options import SamplingOptions
from ipr_fast.models.files.checkpoints import bundled_model_for
from ipr_fast.models.files.content_hash import content_hash, model_hash
from ipr_fast.sampling.acceptance import Metropolis
from ipr_fast.sampling.arguments import free_patches
from ipr_fast.sampling.policies import MaskPolicy, random_patches, sizes_chosen, sweep_patches
from ipr_fast.spaces import regeneration_calls, space_of

CHUNK_ON_CPU, CHUNK_ON_GPU = 256, 4096  # samples that are saved together


@dataclass(frozen=True)
class RefinementOptions:
    """How many iterations, and what each of them renoises."""

    iters: Annotated[int, option(REFINEMENT, "Iterations.", min=0)] = 50
    first_iteration: Annotated[int, option(REFINEMENT, "Number of the first iteration.", min=1)] = 1
    ratio: Annotated[float, option(REFINEMENT, "Alpha, the share of patches renoised.")] = 0.25
    fixed_region: Annotated[
        bool, flag(REFINEMENT, "Renoise the same random patches every iteration.", "--fixed-region")
    ] = False
    sweep: Annotated[
        bool, flag(REFINEMENT, "Renoise every patch once in some 1 / alpha iterations, in random order.", "--sweep")
    ] = False
    noise: Annotated[
        str, one_of(REFINEMENT, "NOISE", "Fresh noise each time, or the initial noise", ("random", "fixed"))
    ] = "random"

    def policy(self) -> MaskPolicy:
        """Return the policy that chooses an iteration's patches. Raises ValueError for options that exclude others."""
        if self.sweep and self.fixed_region:
            raise ValueError("--sweep and --fixed-region exclude each other")
        return sweep_patches(self.ratio) if self.sweep else random_patches(self.ratio, fixed=self.fixed_region)


@dataclass(frozen=True)
class AcceptanceOptions:
    """Whether a chain takes an iteration's sample or keeps its old one."""

    accept: Annotated[
        str | None,
        option(
            ACCEPTANCE,
            "Accept samples by a reward, called as function(samples) -> (B,), higher is better.",
            metavar="MODULE:FUNCTION",
            show_default="take every sample",
        ),
    ] = None
    accept_temperature: Annotated[
        float | None,
        option(
            ACCEPTANCE,
            "Accept with probability min(1, exp(gain / T)); 0 takes what is as good or better.",
            metavar="T",
            show_default="0",
        ),
    ] = None
    keep_best: Annotated[
        bool, flag(ACCEPTANCE, "Write the best sample of each chain, not its last one.", "--keep-best")
    ] = False

    def rule(self) -> Metropolis | None:
        """Return the rule of acceptance. Raises ValueError for bad values, and for options without --accept."""
        if self.accept is None:
            for name, given in (
                ("accept-temperature", self.accept_temperature is not None),
                ("keep-best", self.keep_best),
            ):
                if given:
                    raise ValueError(f"--{name} needs --accept, the reward")
            return None
        reward = reward_from(self.accept)
        temperature = checks.number("--accept-temperature", self.settings["accept-temperature"], 0)
        return Metropolis(reward, temperature, keep_best=self.keep_best)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, by the names of the options."""
        temperature = self.accept_temperature or (None if self.accept is None else 0.0)
        return {"accept": self.accept, "accept-temperature": temperature, "keep-best": self.keep_best}


def run(
    *,
    input: Annotated[
        Path,
        typer.Argument(parser=path, metavar="INPUT", help=".npy, .npz or .pt, or a folder of PNG files."),
    ],
    out: Annotated[Path, path_option(FILES, ".npy, .npz, .pt, or a folder for PNG files.")],
    chunk: Annotated[
        int | None,
        option(
            FILES,
            "Samples that are saved together.",
            min=1,
            show_default=f"{CHUNK_ON_CPU} on a CPU, {CHUNK_ON_GPU} on a GPU",
        ),
    ] = None,
    resume: Annotated[bool, flag(FILES, "Continue an unfinished run, kept in OUT.partial.", "--resume")] = False,
    refinement: RefinementOptions,
    acceptance: AcceptanceOptions,
    sampling: SamplingOptions,
    model: Annotated[str | None, model_option(show_default="the bundled model of that sample shape")] = None,
    dtype: DtypeOption = None,
    run_options: RunOptions,
) -> None:
    """Refine samples that a model has made.

    Example: ipr-fast refine boards.npy --iters 20 --out refined
    """
    device, samples = run_options.checked_device(), files.read_samples(input)
    if out.exists() and out.samefile(input):
        raise ValueError("--out must differ from the input: an interrupted run could not resume")
    with model_from("--model"):
        source = bundled_model_for(tuple(samples.images.shape[1:])) if model is None else model
    denoiser = load(source, dtype, device)
    samples = samples.fitting("the input", space_of(denoiser).sample_shape)
    images = samples.images
    files.check_writable(out, tuple(images.shape), samples.names, images.dtype)
    chunk = chunk or (CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ON_GPU)
    plan = ChunkPlan(len(images), chunk, refinement.first_iteration, refinement.iters)
    arguments: RefineArguments = {
        **sampling.arguments(run_options, device, len(images), denoiser, "refine_schedule"),
        "model": denoiser,
        "noise": refinement.noise,
        "accept": acceptance.rule(),
    }
    settings = {
        "input": content_hash(images),
        "model": model_hash(denoiser, source),
        "known": None if arguments["known"] is None else content_hash(arguments["known"]),
        **{name.replace("_", "-"): value for name, value in dataclasses.asdict(refinement).items() if name != "sweep"},
        **({"sweep": True} if refinement.sweep else {}),  # runs of earlier versions have no such setting
        **acceptance.settings,
        "stochasticity": sampling.stochasticity,
        "temperature": sampling.temperature,
        "seed": run_options.seed,
        "first-chain": sampling.first_chain,
        "schedule": str(arguments["schedule"] or getattr(denoiser, "refine_schedule", None)),
        "dtype": dtype or "as stored",
        "tf32": sampling.tf32,
        "chunk": plan.chunk,
    }
    policy = refinement.policy()
    with run_folder(Path(f"{out}.partial"), settings, plan, resume=resume) as folder:
        tally = Tally()
        x = refine_in_chunks(images, policy, arguments, folder=folder, device=device, tally=tally)
        shown = write(out, dataclasses.replace(samples, images=x), denoiser)
    if arguments["accept"] is not None:
        since = "since the run was resumed: " if folder.goes_on else ""
        print(f"{since}{tally}; {_model_calls(refinement, arguments, len(images)):,.1f} model calls a sample")
    tell(out, x, f"refined samples{shown}")


def _model_calls(refinement: RefinementOptions, arguments: RefineArguments, count: int) -> float:
    """Return the mean number of model calls of a sample, of all iterations."""
    space, known = space_of(arguments["model"]), arguments["known"]
    free = free_patches(known, count, space.grid, arguments["chain_ids"].device).sum(1)
    chosen = sizes_chosen(refinement.ratio, space.grid.num_patches, free.device)[free]
    calls = regeneration_calls(space, arguments["schedule"], "refine_schedule", chosen)
    return refinement.iters * int(calls.sum()) / max(1, count)
