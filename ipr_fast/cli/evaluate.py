"""`ipr-fast evaluate`: measure sample quality before and after refinement, or print an earlier measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ipr_fast import outputs
from ipr_fast.cli.common import (
    FILES,
    REFINEMENT,
    STEPS_AND_OVERLAP,
    RunOptions,
    load,
    model_option,
    option,
    path,
    path_option,
)
from ipr_fast.cli.factory import is_factory
from ipr_fast.cli.sampling_options import schedule_of
from ipr_fast.cli.shard_options import ShardOptions, is_plan, run_plan
from ipr_fast.evaluation.budget_plot import plot_budgets
from ipr_fast.evaluation.diversity import measure_diversity
from ipr_fast.evaluation.evaluate import task_for
from ipr_fast.evaluation.experiments import ARMS, COMPARED, ExperimentSettings, run_experiment
from ipr_fast.evaluation.guidance import METHODS, GuidanceSettings, run_guidance_experiment
from ipr_fast.evaluation.initialisation import compare_initialisations
from ipr_fast.evaluation.repair import PAIRS, measure_repair
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.scale.plan import plan_names
from ipr_fast.evaluation.steps import measure_steps
from ipr_fast.evaluation.tokens import TokenExperimentSettings, run_token_experiment
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.resolve import DEFAULT_MODEL
from ipr_fast.tasks.token_sudoku import TokenSudoku

# Experiments, and the options of each.
OPTIONS = {
    "arms": ("model", "count", "clues", "iters", "compared", "arms"),
    "repair": ("model", "count", "iters", "pairs"),
    "tokens": ("model", "count", "clues", "keep"),
    "guidance": (
        *("model", "count", "clues", "budgets", "calls", "generate-schedule", "refine-schedule", "group"),
        *("methods", "keep"),
    ),
    "steps": ("model", "count", "clues", "iters"),
    "diversity": ("model", "count", "iters"),
    "initialisation": ("count", "every"),
}
DEFAULTS = ExperimentSettings()
DEFAULT_TOKEN_MODEL = "token-sudoku-9x9"
DIVERSITY_ITERS = 20
TRAINING_BOARDS, PROBE_EVERY = 128_000, 32_000


def _experiment(text: str) -> str:
    if text not in OPTIONS and not is_plan(text):
        names = ", ".join([*OPTIONS, *plan_names()])
        raise typer.BadParameter(f"must be one of {names}, or a .toml file, got {text!r}")
    return text


def _some_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """Make the parser of an option that is none, or some of `names` with commas between."""

    def parse(text: str) -> str:
        if not set(_listed(text)) <= set(names):
            raise typer.BadParameter(f"must be none, or some of {','.join(names)}, got {text!r}")
        return text

    return parse


def _pairs(text: str) -> str:
    if not all(word.isdecimal() for word in text.split(",")):
        raise typer.BadParameter(f"must be whole numbers with commas between, got {text!r}")
    return text


def _budgets(text: str) -> str:
    words = text.split(",")
    budgets = [int(word) for word in words if word.isdecimal()]
    if len(budgets) < len(words) or budgets[0] != 1 or budgets != sorted(set(budgets)):
        raise typer.BadParameter(f"must be ascending whole numbers from 1 on with commas between, got {text!r}")
    return text


def _listed(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def run(
    *,
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT",
            parser=_experiment,
            help="arms: one pass, IPR and controls; repair: boards with swapped pairs of cells; "
            "tokens: the orders of a model of tokens, and IPR, at equal calls; guidance: methods that use a "
            "reward, at equal calls; steps: what the model calls of an iteration buy; diversity: how evenly boards of "
            "4x4 cells cover all grids; initialisation: how soon a model of 9x9 cells learns the rules. "
            "In shards, resumed by the same command: "
            f"{', '.join(plan_names())}, or a .toml file of yours.",
        ),
    ] = "arms",
    out: Annotated[
        Path | None, path_option(FILES, "JSON file for the measurement; of an experiment in shards, its folder.")
    ] = None,
    report_file: Annotated[
        Path | None,
        option(
            FILES, "Print the measurement in this JSON file; measure nothing.", "--report", parser=path, metavar="PATH"
        ),
    ] = None,
    plot: Annotated[
        Path | None, path_option(FILES, "PNG file for a curve of --report's shares by model calls.")
    ] = None,
    count: Annotated[
        int | None,
        option(
            REFINEMENT,
            "Samples; for initialisation, boards to train on.",
            min=1,
            show_default=f"{DEFAULTS.count}; {GuidanceSettings.count} for tokens and guidance; {TRAINING_BOARDS}",
        ),
    ] = None,
    clues: Annotated[
        tuple[int, int] | None,
        option(REFINEMENT, "Clue cells per board, in digit images unknown to the model.", metavar="LOW HIGH"),
    ] = None,
    iters: Annotated[
        int | None,
        option(
            REFINEMENT,
            "Iterations at alpha 0.25; for diversity, all; for steps, before a sweep.",
            min=1,
            show_default=f"{DEFAULTS.iters}; {DIVERSITY_ITERS}",
        ),
    ] = None,
    compared: Annotated[
        int | None,
        option(REFINEMENT, "Iterations of the other arms.", min=1, show_default=f"{COMPARED}, or --iters if less"),
    ] = None,
    arms: Annotated[
        str | None,
        option(
            REFINEMENT,
            f"Arms beside one pass and alpha 0.25, with commas between: {', '.join(ARMS)}; or none.",
            parser=_some_of(ARMS),
            metavar="ARMS",
            show_default="all",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        option(
            REFINEMENT,
            "Swapped pairs of cells, for repair, with commas between.",
            parser=_pairs,
            metavar="PAIRS",
            show_default=",".join(map(str, PAIRS)),
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        option(
            REFINEMENT,
            "Model calls, for guidance, in passes, with commas between.",
            parser=_budgets,
            metavar="BUDGETS",
            show_default=",".join(map(str, GuidanceSettings.budgets)),
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        path_option(FILES, "Folder for what tokens and guidance have made; the same command goes on from it."),
    ] = None,
    calls: Annotated[
        int | None,
        option(REFINEMENT, "Model calls of a pass of tokens, for guidance.", min=1, show_default="one for each cell"),
    ] = None,
    generate_schedule: Annotated[
        tuple[str, str] | None,
        option(
            REFINEMENT,
            "Of a pass of images, for guidance: denoising steps per patch, and how far patches overlap in time.",
            metavar=STEPS_AND_OVERLAP,
            show_default="the model's",
        ),
    ] = None,
    refine_schedule: Annotated[
        tuple[str, str] | None,
        option(REFINEMENT, "The same of an iteration.", metavar=STEPS_AND_OVERLAP, show_default="the model's"),
    ] = None,
    group: Annotated[
        int | None, option(REFINEMENT, "Patches that start at a time, by these schedules.", min=1, max=65536)
    ] = None,
    methods: Annotated[
        str | None,
        option(
            REFINEMENT,
            f"Methods beside best of N, for guidance, with commas between: {', '.join(METHODS)}; or none.",
            parser=_some_of(METHODS),
            metavar="METHODS",
            show_default="all",
        ),
    ] = None,
    every: Annotated[
        int | None,
        option(
            REFINEMENT, "Boards of training between probes, for initialisation.", min=1, show_default=str(PROBE_EVERY)
        ),
    ] = None,
    model: Annotated[str | None, model_option(show_default=DEFAULT_MODEL)] = None,
    shard_options: ShardOptions,
    run_options: RunOptions,
) -> None:
    """Measure sample quality before and after refinement, beside controls.

    Example: ipr-fast evaluate --count 64 --out quality.json
    """
    given = {
        "model": model,
        "count": count,
        "clues": clues,
        "iters": iters,
        "compared": compared,
        "arms": None if arms is None else _listed(arms),
        "pairs": None if pairs is None else tuple(map(int, pairs.split(","))),
        "budgets": None if budgets is None else tuple(map(int, budgets.split(","))),
        "calls": calls,
        "generate-schedule": schedule_of("--generate-schedule", generate_schedule),
        "refine-schedule": schedule_of("--refine-schedule", refine_schedule),
        "group": group,
        "methods": None if methods is None else _listed(methods),
        "every": every,
        "keep": keep,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if report_file is not None:
        others = [*([] if out is None else ["out"]), *given, *shard_options.given()]
        if others:
            raise ValueError(f"--{others[0]} does not go with --report, which measures nothing")
        text = read_report(report_file)
        if plot is not None:
            draw_plot(report_file, plot)
        print(text)
        return
    if plot is not None:
        raise ValueError("--plot draws the measurement of --report")
    has = ("model", "count", *vars(shard_options)) if is_plan(experiment) else OPTIONS[experiment]
    for name in (*given, *shard_options.given()):
        if name not in has:
            raise ValueError(f"--{name} is not an option of {experiment}, which has {', '.join(has)}")
    if is_plan(experiment):
        run_plan(experiment, out, model, count, shard_options, run_options)
        return
    device = run_options.checked_device()
    if out is not None:
        outputs.check_no_folders([out])
        outputs.prepare_folder(out.parent)
    with ExitStack() as held:
        if keep is not None:
            outputs.prepare_folder(keep)
            held.enter_context(outputs.alone_in(keep))
        results = _measure(experiment, given, device, run_options, out)
    print(report(results))  # first, so that a full disk does not lose it
    if out is not None:
        outputs.write_json(out, results)


def _schedules(given: dict[str, Any]) -> dict[str, Any]:
    """Take the schedules of images, and the group of both, out of the given options, as settings."""
    group = given.pop("group", None)
    found = {name: given.pop(f"{name}-schedule") for name in ("generate", "refine") if f"{name}-schedule" in given}
    if group is not None and not found:
        raise ValueError("--group goes with --generate-schedule or --refine-schedule")
    return {f"{name}_schedule": replace(each, group=group or 1) for name, each in found.items()}


def _measure(
    experiment: str, given: dict[str, Any], device: torch.device, run_options: RunOptions, out: Path | None
) -> dict:
    seed, progress = run_options.seed, run_options.progress
    if experiment == "initialisation":
        boards, every = given.get("count", TRAINING_BOARDS), given.get("every", PROBE_EVERY)
        say = print if progress else lambda line: None
        return compare_initialisations(boards, every, seed=seed, device=device, say=say)
    name = given.pop("model", DEFAULT_TOKEN_MODEL if experiment == "tokens" else DEFAULT_MODEL)
    denoiser = load(name, None if is_factory(name) else "float32", device)
    task, folder = task_for(denoiser), given.pop("keep", None)
    found = (lambda results: None) if out is None else partial(outputs.write_json, out)
    if experiment == "tokens":
        if not isinstance(denoiser, TokenDenoiser) or not isinstance(task, TokenSudoku):
            raise ValueError(f"model: this is an experiment on tokens, got a model of {task.name}")
        settings = TokenExperimentSettings(seed=seed, **given)
        return run_token_experiment(task, denoiser, name, settings, progress=progress, folder=folder, found=found)
    if experiment == "repair":
        return measure_repair(
            task,
            denoiser,
            name,
            given.get("count", DEFAULTS.count),
            given.get("iters", DEFAULTS.iters),
            given.get("pairs", PAIRS),
            seed=seed,
            progress=progress,
        )
    if experiment == "guidance":
        schedules = _schedules(given)
        guided = GuidanceSettings(seed=seed, **schedules, **given)
        return run_guidance_experiment(task, denoiser, name, guided, progress=progress, folder=folder, found=found)
    if isinstance(denoiser, TokenDenoiser) or isinstance(task, TokenSudoku):
        raise ValueError(f"model: {experiment} is measured on images, got a model of {task.name}; see evaluate tokens")
    if experiment == "arms":
        return run_experiment(task, denoiser, name, replace(DEFAULTS, seed=seed, **given), progress=progress)
    count, iters = given.get("count", DEFAULTS.count), given.get("iters", DIVERSITY_ITERS)
    if experiment == "steps":
        clues = given.get("clues", DEFAULTS.clues)
        return measure_steps(task, denoiser, name, count, iters, clues, seed=seed, progress=progress)
    return measure_diversity(task, denoiser, count, iters, seed=seed, progress=progress)


def draw_plot(file: Path, out: Path) -> None:
    """Draw the shares by budget of the measurement in a file. Raises ValueError for one without budgets."""
    results = json.loads(file.read_bytes())
    if "rows" not in results:
        raise ValueError(f"--plot: {file}: not a measurement by model calls, of tokens or guidance")
    outputs.prepare_folder(out.parent)
    plot_budgets(out, results)


def read_report(file: Path) -> str:
    """The report of a measurement in a file. Raises ValueError for a file of anything else."""
    measurement = "a measurement of ipr-fast evaluate"
    try:
        return report(outputs.read_json(file, measurement))
    except KeyError as error:
        raise ValueError(f"{file}: not {measurement} (it has no {error})") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: not {measurement} ({error})") from error
