"""Arms of an experiment: how samples are made, how they are refined, and what that costs, for chains of any ids.

`Chains` runs arms on the same chains, so that they are compared sample by sample; arms that start alike share their
start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.acceptance import Metropolis
from ipr_fast.sampling.corrupt import swap_patches
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.sampling.policies import (
    MaskPolicy,
    all_patches,
    random_patches,
    sizes_chosen,
    uncertain_patches,
    violating_patches,
)
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.tokens import TokenSchedule
from ipr_fast.spaces import TokenSpace, regeneration_calls, space_of
from ipr_fast.tasks.base import Judge, Report

POLICIES = ("random", "fixed", "uncertain", "violating", "all", "independent")
NOISES = ("random", "fixed")
SAMPLES_APART = 2**32  # between the seeds of a chain's independent samples


@dataclass(frozen=True)
class Arm:
    """One way to make samples: a start, and iterations of refinement.

    iterations: 0 for the start alone. policy: the patches of an iteration: "random" (a share `ratio` of the free ones,
    other ones in each iteration), "fixed" (the same ones in every iteration), "uncertain" (as many, of the highest
    uncertainty), "violating" (at most as many, of those that the judge's report names) or "all"; or "independent":
    another sample from noise, of which each chain keeps the better one by the judge's first measure.
    noise: as for `refine_batch`. generate, refine: arguments of a Schedule, of tokens a TokenSchedule, for the start
    and for an iteration; None: the model's own. swapped: start from valid boards with so many swapped pairs of cells,
    all of them free, in place of samples from noise.
    accept: the temperature of a Metropolis rule whose reward is minus the judge's first measure; None accepts every
    iteration.
    """

    name: str
    iterations: int = 0
    policy: str = "random"
    ratio: float = 0.25
    noise: str = "random"
    generate: Mapping[str, Any] | None = None
    refine: Mapping[str, Any] | None = None
    stochasticity: float = 0.5
    temperature: float = 1.0
    swapped: int | None = None
    accept: float | None = None

    def __post_init__(self) -> None:
        if not self.name or "|" in self.name:
            raise ValueError(f"an arm must have a name without |, got {self.name!r}")
        for field, value, known in (("policy", self.policy, POLICIES), ("noise", self.noise, NOISES)):
            if value not in known:
                raise ValueError(f"arm {self.name}: {field} must be one of {', '.join(known)}, got {value!r}")
        try:
            checks.integer("iterations", self.iterations, 0)
            checks.number("stochasticity", self.stochasticity, 0, 1)
            checks.number("temperature", self.temperature, 0)
            if self.accept is not None:
                checks.number("accept", self.accept, 0)
            if self.swapped is not None:
                checks.integer("swapped", self.swapped, 0)
            random_patches(self.ratio)  # checks the ratio
        except ValueError as error:
            raise ValueError(f"arm {self.name}: {error}") from error
        if self.policy == "independent" and self.swapped is not None:
            raise ValueError(f"arm {self.name}: independent samples start from noise, not from swapped cells")

    def mask_policy(self, judge: Judge) -> MaskPolicy:
        """Return the policy that chooses an iteration's patches."""
        if self.policy == "uncertain":
            return uncertain_patches(self.ratio)
        if self.policy == "violating":
            return violating_patches(judge, self.ratio)
        return all_patches() if self.policy == "all" else random_patches(self.ratio, fixed=self.policy == "fixed")

    def chosen(self, free: Tensor, num_patches: int) -> Tensor:
        """Return how many of the free patches (B,), of `num_patches`, an iteration regenerates at most."""
        whole = self.policy in ("all", "independent")
        return free if whole else sizes_chosen(self.ratio, num_patches, free.device)[free]


class Given(NamedTuple):
    """Clues of B samples: known (B, N) bool, and values (B, ...) that hold them."""

    known: Tensor
    values: Tensor


class Costs(NamedTuple):
    """Cost of each of B samples up to an iteration, (B,) int64 each.

    calls: model calls (NFE). evaluations: patches computed in those calls. rewards: samples that were judged in order
    to choose among them or their patches.
    """

    calls: Tensor
    evaluations: Tensor
    rewards: Tensor


class Chains:
    """B chains of a model, on which arms are run. Reports and samples are on the model's device.

    ids: (B,) int64. given: clues, if any. boards: makes valid boards (B, ...) of these chains, for arms with swapped
    cells. engine_seconds: time spent in the engine so far.
    """

    def __init__(
        self,
        model: Denoiser | TokenDenoiser,
        judge: Judge,
        ids: Tensor,
        *,
        seed: int = 0,
        given: Given | None = None,
        boards: Callable[[], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        self.device = contract.device_of(model) or torch.device("cpu")
        self.model, self.judge, self.seed, self.ids = model, judge, seed, ids.to(self.device)
        self.given = None if given is None else Given(*(each.to(self.device) for each in given))
        self.space = space_of(model)
        self.num_patches = self.space.grid.num_patches
        self.engine_seconds = 0.0
        self._boards, self._progress = boards, progress
        self._starts: dict[tuple, tuple[Tensor, Report]] = {}
        free = [self.num_patches] * len(ids) if given is None else (~given.known).sum(1).tolist()
        self._free = torch.tensor(free, dtype=torch.int64, device="cpu")

    def start(self, arm: Arm) -> tuple[Tensor, Report]:
        """Return the samples (B, ...) that an arm refines, and the judge's report on them."""
        key = (arm.swapped, repr(arm.generate), arm.stochasticity, arm.temperature)
        if key not in self._starts:
            x = self._generated(arm, self.seed) if arm.swapped is None else self._swapped(arm.swapped)
            self._starts[key] = x, self.judge(x)
        return self._starts[key]

    def follow(self, arm: Arm, watch: Callable[[int, Tensor, Report], None], at: frozenset[int] | None = None) -> None:
        """Run an arm: call watch(iteration, samples, report) for its start, 0, and after the iterations `at`.

        at: all of them by default. "independent" judges every sample, whatever `at` is.
        """
        x, report = self.start(arm)
        watch(0, x, report)
        if arm.policy == "independent":
            self._choose_among_independent(arm, x, report, watch, at)
        elif arm.iterations:
            self._refine(arm, x, watch, at)

    def costs(self, arm: Arm, iteration: int) -> Costs:
        """Return what the samples have cost after an iteration; of "violating", what they have cost at most.

        `prepare` computes all N patches once a regeneration; a call computes the active ones.
        """
        free = self._free if arm.swapped is None else torch.full_like(self._free, self.num_patches)
        begin = self._regeneration(arm, "generate", free)
        again = self._regeneration(arm, "refine", arm.chosen(free, self.num_patches))
        if arm.policy == "independent":
            again = begin
        if arm.swapped is not None:
            begin = tuple(torch.zeros_like(each) for each in begin)
        calls, evaluations = (first + iteration * each for first, each in zip(begin, again, strict=True))
        judged = iteration + 1 if iteration and (arm.accept is not None or arm.policy == "independent") else 0
        judged += iteration if arm.policy == "violating" else 0
        return Costs(calls, evaluations, torch.full_like(calls, judged))

    # ---------------------------------------------------------------------------------------------------- one arm

    def _schedule(self, arm: Arm, kind: str) -> Schedule | TokenSchedule | None:
        arguments: Mapping[str, Any] | None = getattr(arm, kind)
        if arguments is None:
            return None
        make = TokenSchedule if isinstance(self.space, TokenSpace) else Schedule
        try:
            return make(**arguments)
        except TypeError as error:
            raise ValueError(f"arm {arm.name}: {kind} must hold arguments of {make.__name__} ({error})") from error
        except ValueError as error:
            raise ValueError(f"arm {arm.name}: {kind}: {error}") from error

    def _regeneration(self, arm: Arm, kind: str, active: Tensor) -> tuple[Tensor, ...]:
        """Return calls and patch evaluations of one regeneration, by the number of active patches (B,)."""
        calls = regeneration_calls(self.space, self._schedule(arm, kind), f"{kind}_schedule", active)
        return calls, self.num_patches + calls * active

    def _generated(self, arm: Arm, seed: int) -> Tensor:
        begun = time.perf_counter()
        x = generate_batch(
            len(self.ids),
            model=self.model,
            known=None if self.given is None else self.given.known,
            known_values=None if self.given is None else self.given.values,
            schedule=self._schedule(arm, "generate"),
            stochasticity=arm.stochasticity,
            temperature=arm.temperature,
            seed=seed,
            chain_ids=self.ids,
            progress=self._progress,
        )
        self._count_seconds(begun)
        return x

    def _swapped(self, pairs: int) -> Tensor:
        if self._boards is None:
            raise ValueError(f"swapped: the task has no boards whose cells could be swapped, got {pairs} pairs")
        grid = self.space.grid
        size = grid.patch_shape if isinstance(grid, PatchGrid) else 1  # tokens
        boards = self._boards().to(self.device)
        return swap_patches(boards, pairs, size, seed=self.seed, chain_ids=self.ids)

    def _refine(
        self, arm: Arm, x: Tensor, watch: Callable[[int, Tensor, Report], None], at: frozenset[int] | None
    ) -> None:
        begun, judging = time.perf_counter(), 0.0

        def after(iteration: int, samples: Tensor) -> None:
            nonlocal judging
            if at is not None and iteration not in at:
                return
            self._synchronize()
            paused = time.perf_counter()
            watch(iteration, samples, self.judge(samples))
            judging += time.perf_counter() - paused

        accept = None if arm.accept is None else Metropolis(self._reward, arm.accept)
        refine_batch(
            x,
            arm.mask_policy(self.judge),
            arm.iterations,
            model=self.model,
            known=None if self.given is None or arm.swapped is not None else self.given.known,
            schedule=self._schedule(arm, "refine"),
            stochasticity=arm.stochasticity,
            temperature=arm.temperature,
            seed=self.seed,
            chain_ids=self.ids,
            noise=arm.noise,
            accept=accept,
            callback=after,
            progress=self._progress,
        )
        self._count_seconds(begun)
        self.engine_seconds -= judging

    def _choose_among_independent(
        self,
        arm: Arm,
        best: Tensor,
        held: Report,
        watch: Callable[[int, Tensor, Report], None],
        at: frozenset[int] | None,
    ) -> None:
        for iteration in range(1, arm.iterations + 1):
            x = self._generated(arm, (self.seed + iteration * SAMPLES_APART) % 2**64)
            report = self.judge(x)
            better = _first_measure(report) < _first_measure(held)
            best = torch.where(_rows(better, x), x, best)
            fields = [torch.where(_rows(better, a), a, b) for a, b in zip(report, held, strict=True)]
            held = type(report)(*fields)
            if at is None or iteration in at:
                watch(iteration, best, held)

    def _reward(self, x: Tensor) -> Tensor:
        return -_first_measure(self.judge(x)).double()

    def _count_seconds(self, begun: float) -> None:
        self._synchronize()
        self.engine_seconds += time.perf_counter() - begun

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _first_measure(report: Report) -> Tensor:
    return next(iter(report.measures().values()))


def _rows(chosen: Tensor, like: Tensor) -> Tensor:
    """Return chosen (B,) in a shape that broadcasts over samples like (B, ...)."""
    return chosen.view(-1, *(1,) * (like.ndim - 1))
