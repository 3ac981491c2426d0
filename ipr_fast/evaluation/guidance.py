"""Methods that use a reward, at equal model calls: best of N, refinement with acceptance, and guided generation.

The reward is minus the violations of a board, by the judge that also counts the valid ones. Every arm has chains
0..B-1, one seed and the same clues. A budget is a multiple of the model calls of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipr_fast.evaluation import environment
from ipr_fast.evaluation.cells import Cells
from ipr_fast.evaluation.evaluate import draw_clues
from ipr_fast.evaluation.experiments import described
from ipr_fast.evaluation.ledger import Ledger
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.content_hash import model_hash
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.acceptance import Metropolis
from ipr_fast.sampling.guidance.generation import Guidance
from ipr_fast.sampling.guidance.iterref import IterRef
from ipr_fast.sampling.guidance.steering import Steering
from ipr_fast.sampling.guidance.svdd import SVDD
from ipr_fast.sampling.policies import random_patches, sizes_chosen, violating_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.spaces import regeneration_calls, space_of
from ipr_fast.tasks.catalog import KnownTask
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku

ALPHA = 0.25  # the share of patches that an iteration of IPR, or a move of IterRef, renoises
LEVELS = (0.5, 0.25, 0.0)  # of IterRef and, but for 0, of FK steering
RIVAL = "best of N"
GUIDED = {IterRef: "iterref", Steering: "steering", SVDD: "svdd"}
METHODS = ("refinement", "violations", "others", *GUIDED.values())  # measured beside the rival; the first three are IPR
PATIENCE = 3  # iterations at the violations before a new board
OTHERS, OTHERS_PATIENCE = 0.4, 5  # the share of cells that are renoised beside those that violate, and its iterations


@dataclass(frozen=True)
class GuidanceSettings:
    """Settings of an experiment on `count` samples.

    clues: given cells a board, uniform in clues[0]..clues[1]. budgets: multiples of one pass, ascending, the first 1.
    calls: of a pass of tokens, and a quarter of them of an iteration; None for the model's schedules.
    generate_schedule, refine_schedule: of passes and of iterations of images; None for the model's. temperature: of
    Metropolis' rule, IterRef and FK steering, in violations.
    """

    count: int = 2000
    clues: tuple[int, int] = (0, 0)
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16)
    calls: int | None = None
    generate_schedule: Schedule | None = None
    refine_schedule: Schedule | None = None
    temperature: float = 0.5
    methods: tuple[str, ...] = METHODS
    seed: int = 0


class GuidanceExperiment:
    """Runs arms on B chains of a model of boards, and adds their cells to `cells`.

    Best of N, greedy chains, the best boards so far and those refined at their violations need no more calls once they
    have a valid board. They are not run on, but their cells count the calls of their budget.
    """

    def __init__(
        self,
        task: DigitSudoku | TokenSudoku,
        model: Denoiser | TokenDenoiser,
        settings: GuidanceSettings,
        cells: Cells,
        progress: bool = False,
    ) -> None:
        self.model, self.settings, self.cells, self.judge = model, settings, cells, task.judge()
        self.options: dict[str, Any] = {"model": model, "seed": settings.seed, "progress": progress}
        self.chains = torch.arange(settings.count, device=contract.device_of(model) or torch.device("cpu"))
        clues = draw_clues(task, settings.count, settings.clues, settings.seed)
        self.free = torch.ones(settings.count, task.side**2, dtype=torch.bool, device=self.chains.device)
        self.given: dict[str, Tensor] = {}
        if clues is not None:
            self.given = {"known": clues[0].to(self.chains.device), "known_values": clues[1].to(self.chains.device)}
            self.free = ~self.given["known"]
        self.schedules = schedules_of(model, settings)
        # Model calls of a pass and of an iteration, (N + 1,) each, by the number of active patches.
        numbers, space = torch.arange(task.side**2 + 1, device=self.chains.device), space_of(model)
        self.calls = {kind: regeneration_calls(space, each, kind, numbers) for kind, each in self.schedules.items()}
        # Patches that an iteration of IPR renoises.
        self.most_chosen = sizes_chosen(ALPHA, task.side**2, self.chains.device)[self.free.sum(1)]
        self.passes = self.calls["generate_schedule"][self.free.sum(1)]
        self.pass_calls = float(self.passes.double().mean())
        self.iteration_calls = float(self.calls["refine_schedule"][self.most_chosen].double().mean())
        if not self.pass_calls or not self.iteration_calls:
            raise ValueError(f"clues: all cells are given on boards of {settings.clues[1]} clues")

    @cached_property
    def start(self) -> Tensor:
        """The boards of one pass."""
        return self.generate(self.chains)

    def violations(self, x: Tensor) -> Tensor:
        return self.judge(x).violations

    def reward(self, x: Tensor) -> Tensor:
        return -self.violations(x).double()

    def generate(self, rows: Tensor, sample: int = 0, guidance: Guidance | None = None) -> Tensor:
        """Generate boards of these chains (R,); sample: which of a chain's independent ones."""
        return generate_batch(
            len(rows),
            chain_ids=rows + sample * self.settings.count,
            guidance=guidance,
            schedule=self.schedules["generate_schedule"],
            **self._clues(rows, "known", "known_values"),
            **self.options,
        )

    def _clues(self, rows: Tensor, *names: str) -> dict[str, Any]:
        return {name: each[rows] for name, each in self.given.items() if name in names}

    def best_of_n(self) -> None:
        """Add the best of as many samples as the budget has passes."""
        fewest, budgets = self.violations(self.start), self.settings.budgets
        for number in range(1, budgets[-1] + 1):
            rows = fewest.nonzero().flatten()
            if number > 1 and len(rows):
                fewest[rows] = fewest[rows].minimum(self.violations(self.generate(rows, number - 1)))
            if number in budgets:
                self.cells.add(RIVAL, number, fewest.clone(), number * self.pass_calls, number)

    def refined(self, accept: Metropolis | None, *, last: str | None = None, best: str | None = None) -> None:
        """Add one pass and as many iterations as the budget has calls left.

        last, best: arms, of each chain's last board and of its best one so far; None for neither.
        """
        at: dict[int, list[int]] = {}
        for budget in self.settings.budgets:
            at.setdefault(int((budget - 1) * self.pass_calls / self.iteration_calls), []).append(budget)
        now = self.violations(self.start)
        fewest, stops = now.clone(), last is None or (accept is not None and accept.temperature == 0)
        rows = fewest.nonzero().flatten() if stops else self.chains

        def note(iteration: int, x: Tensor | None = None) -> Tensor | None:
            if x is not None:
                now[rows] = self.violations(x)
                torch.minimum(fewest, now, out=fewest)
            calls = self.pass_calls + iteration * self.iteration_calls
            for budget in at.pop(iteration, []):
                if last is not None:
                    self.cells.add(last, budget, now.clone(), calls, 0 if accept is None else 1 + iteration)
                if best is not None:
                    self.cells.add(best, budget, fewest.clone(), calls, 1 + iteration)
            return fewest[rows] == 0 if stops else None

        note(0)
        if at and len(rows):
            refine_batch(
                self.start[rows],
                random_patches(ALPHA),
                max(at),
                chain_ids=rows,
                accept=accept,
                callback=note,
                schedule=self.schedules["refine_schedule"],
                **self._clues(rows, "known"),
                **self.options,
            )
        for iteration in list(at):  # all boards were valid
            note(iteration)

    def at_violations(self, arm: str, patience: int | None = None, others: float = 0.0) -> None:
        """Add boards whose violating cells are regenerated, at most as many as an iteration of IPR renoises.

        patience: iterations before a new board takes the place of one that is not valid; None for no new boards.
        others: the share of cells that are regenerated beside those; all violating ones are then. A chain's budget is a
        multiple of its own pass. The rewards are those of a chain that comes to the budget's end.
        """
        ledger = Ledger(self.passes, self.settings.budgets)
        policy, rows, sample = violating_patches(self.judge, 1.0 if others else ALPHA, others=others), self.chains, 0
        shortest = int(self.calls["refine_schedule"][1])
        while len(rows):
            x = self.generate(rows, sample) if sample else self.start
            calls = self._look(ledger, rows, self.passes[rows], x, others)
            x, rows, calls = x[calls > 0], rows[calls > 0], calls[calls > 0]
            if len(rows):
                refine_batch(
                    x,
                    policy,
                    patience or int(ledger.limits.max()) // shortest,
                    chain_ids=rows + sample * self.settings.count,
                    callback=partial(self._note_iteration, ledger, rows, calls, others),
                    schedule=self.schedules["refine_schedule"],
                    **self._clues(rows, "known"),
                    **self.options,
                )
            goes_on = (ledger.fewest[-1] > 0) & ledger.affords(self.chains, self.passes)[-1]
            rows, sample = self.chains[goes_on] if patience else self.chains[:0], sample + 1
        for number, budget in enumerate(self.settings.budgets):
            judged = int(ledger.judged[number].max())
            self.cells.add(arm, budget, ledger.fewest[number].clone(), budget * self.pass_calls, judged)

    def _note_iteration(
        self, ledger: Ledger, rows: Tensor, calls: Tensor, others: float, iteration: int, x: Tensor
    ) -> Tensor:
        """Note an iteration of so many calls (R,), 0 for boards that are done, and return which are done now (R,).

        Writes the calls of the next iteration into `calls`.
        """
        running = calls > 0
        calls[running] = self._look(ledger, rows[running], calls[running], x[running], others)
        return calls == 0

    def _look(self, ledger: Ledger, rows: Tensor, calls: Tensor, x: Tensor, others: float) -> Tensor:
        """Note boards x of `rows`, on which calls (R,) were spent; return the calls (R,) of the next iteration.

        Those are 0 for valid boards and beyond the last budget.
        """
        report = self.judge(x)
        ledger.note(rows, calls, report.violations)
        violating, free = (report.violating_cells.flatten(1) & self.free[rows]).sum(1), self.free[rows].sum(1)
        beside = (others * free).long() * (violating > 0)
        chosen = (violating.minimum(free if others else self.most_chosen[rows]) + beside).minimum(free)
        following = self.calls["refine_schedule"][chosen]
        return following * ledger.affords(rows, following)[-1]

    def guided(self, arm: str, budget: int, guidance: Guidance) -> None:
        """Add a generation toward the reward."""
        x = self.generate(self.chains, 0, guidance)
        last: Any = guidance.last  # type: ignore[attr-defined]
        calls, asked = (float(each.double().mean()) for each in getattr(last, "cost", last))
        self.cells.add(arm, budget, self.violations(x), calls, asked)

    def measure(self, done: Callable[[], object]) -> None:
        """Run the settings' methods where their cells are missing; call `done` after each arm."""
        cells, temperature, methods = self.cells, self.settings.temperature, self.settings.methods
        tempered = f"IPR, Metropolis, T = {temperature:g}, best so far"
        arms: dict[str, Callable[[], None]] = {RIVAL: self.best_of_n}
        if "refinement" in methods:
            arms |= {
                "IPR": partial(self.refined, None, last="IPR", best="IPR, best so far"),
                "IPR, greedy": partial(self.refined, Metropolis(self.reward), last="IPR, greedy"),
                tempered: partial(self.refined, Metropolis(self.reward, temperature), best=tempered),
            }
        if "violations" in methods:
            for arm, patience in (("IPR, at violations", None), ("IPR, at violations, new boards", PATIENCE)):
                arms[arm] = partial(self.at_violations, arm, patience)
        if "others" in methods:
            arm = "IPR, at violations and others, new boards"
            arms[arm] = partial(self.at_violations, arm, OTHERS_PATIENCE, OTHERS)
        for arm, run in arms.items():
            if not cells.holds(arm, self.settings.budgets[-1]):
                run()
                cells.save()
                done()
        given = self.schedules["generate_schedule"]
        schedule = space_of(self.model).sampling(given, "generate_schedule", 0.5, 1.0, 0, "random").schedule
        every = schedule.steps_per_patch if isinstance(schedule, Schedule) else 1
        for budget in self.settings.budgets:
            for arm, guidance in guidances(self.pass_calls, budget, self.reward, temperature, every).items():
                if GUIDED[type(guidance)] in methods and not cells.holds(arm, budget):
                    self.guided(arm, budget, guidance)
                    cells.save()
                    done()


def schedules_of(
    model: Denoiser | TokenDenoiser, settings: GuidanceSettings
) -> dict[str, Schedule | TokenSchedule | None]:
    """Return the schedules of a pass and of an iteration; None for the model's."""
    given = {name: getattr(settings, name) for name in ("generate_schedule", "refine_schedule")}
    calls, for_tokens = settings.calls, isinstance(model, TokenDenoiser)
    for name, schedule in given.items():
        if for_tokens and schedule is not None:
            raise ValueError(f"{name}: it is a setting of models of images, got a model of tokens; see calls")
    if calls is None:
        return given
    if not for_tokens:
        raise ValueError("calls: they are a setting of models of tokens, got a model of images")
    return {"generate_schedule": TokenSchedule(calls), "refine_schedule": TokenSchedule(max(1, round(ALPHA * calls)))}


def guidances(
    calls: float, budget: int, reward: Callable[[Tensor], Tensor], temperature: float, every: int = 1
) -> dict[str, IterRef | Steering | SVDD]:
    """Return methods by arm that take `budget` times the model calls of one pass; none that would take many more.

    calls: of one pass. every: steps from one choice of SVDD to the next. A state is completed by one call, but for
    finished ones: a move of IterRef takes the calls of a share ALPHA of the pass and this one; a particle of FK
    steering one more at each level; a candidate of SVDD one more at each choice but the last. IterRef goes back to the
    start of a patch, by up to `every` - 1 steps more than are counted, and so may pass the budget by some 2 %.
    """
    extra, noise_steps = len(LEVELS) - 1, max(1, int(ALPHA * calls))
    moves = int(((budget - 1) * calls - extra) / ((extra + 1) * noise_steps + extra))
    particles = int(budget * calls / (calls + extra))
    candidates = int(budget * calls / (calls + math.ceil(calls / every) - 1))
    found: dict[str, IterRef | Steering | SVDD] = {}
    if moves >= 1:
        found[f"IterRef, T = {temperature:g}"] = IterRef(reward, temperature, LEVELS, moves, noise_steps)
    if particles >= 2:
        levels = tuple(level for level in LEVELS if level)
        found[f"FK steering, T = {temperature:g}"] = Steering(reward, temperature, particles, levels)
    if candidates >= 2:
        found["SVDD"] = SVDD(reward, 0.0, candidates, every)
    return found


def run_guidance_experiment(
    task: KnownTask,
    model: Denoiser | TokenDenoiser,
    name: str,
    settings: GuidanceSettings,
    *,
    progress: bool = False,
    folder: Path | None = None,
    found: Callable[[dict], object] = lambda results: None,
) -> dict:
    """Measure valid boards by method and budget; return rows ready for JSON, each cell compared with best of N.

    name: of the model, for the record. folder: keeps what was measured, so that a stopped measurement goes on from it.
    found: called with the results so far. Raises ValueError for a task without boards, and for an unknown method.
    """
    if not set(settings.methods) <= set(METHODS):
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, got {settings.methods}")
    if not isinstance(task, (DigitSudoku, TokenSudoku)):
        raise ValueError(f"model: guidance is measured on boards of digits, got a model of {task.name}")
    decided = {key: value for key, value in asdict(settings).items() if key != "methods"}  # they add rows
    cells = Cells({"model": name, "weights": model_hash(model, name), **decided}, folder)
    experiment = GuidanceExperiment(task, model, settings, cells, progress)

    def results() -> dict:
        return {
            **described(task, name, settings.count, settings.clues, settings.seed, experiment.judge.note),
            **{name: each.values for name, each in experiment.schedules.items() if isinstance(each, Schedule)},
            "multiples": settings.budgets,
            "pass_calls": experiment.pass_calls,
            "temperature": settings.temperature,
            "rows": cells.rows(RIVAL),
            "environment": environment.describe(experiment.chains.device, cells.commits),
        }

    experiment.measure(lambda: found(results()))
    return results()
